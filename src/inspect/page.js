(() => {
  const main = document.querySelector('main'), status = document.getElementById('status'), button = document.getElementById('pause');
  if (!main || !window.EventSource) return;
  // Makes a like b and touches no more than it has to: focus, selection and scrolling stay.
  const like = (a, b) => {
    if (a.isEqualNode(b)) return;
    if (a.nodeType !== b.nodeType || a.nodeName !== b.nodeName || (a.nodeType === 1 && a.dataset.key !== b.dataset.key)) return a.replaceWith(b);
    if (a.nodeType !== 1) { a.data = b.data; return; }
    for (const { name } of [...a.attributes]) if (name !== 'open' && !b.hasAttribute(name)) a.removeAttribute(name);
    for (const { name, value } of b.attributes) if (a.getAttribute(name) !== value) a.setAttribute(name, value);
    const keyed = new Map();
    for (const child of a.children) if (child.dataset.key) keyed.set(child.dataset.key, child);
    let at = a.firstChild;
    for (const child of [...b.childNodes]) {
      const old = child.dataset && child.dataset.key ? keyed.get(child.dataset.key) : null;
      if (old && old !== at) a.insertBefore(old, at); else if (!old && child.dataset && child.dataset.key) { a.insertBefore(child, at); continue; }
      const now = old || at;
      if (!now) { a.appendChild(child); continue; }
      at = now.nextSibling;
      like(now, child);
    }
    while (at) { const next = at.nextSibling; at.remove(); at = next; }
  };
  let source;
  const say = text => { if (status.textContent !== text) status.textContent = text; };
  const stop = () => { source && source.close(); source = null; };
  const start = () => {
    stop();
    const url = new URL(location.href);
    url.searchParams.set('live', '1');
    source = new EventSource(url.pathname + url.search);
    source.onmessage = event => {
      const next = new DOMParser().parseFromString(event.data, 'text/html').body;
      const old = main.cloneNode(false);
      old.append(...next.childNodes);
      like(main, old);
      say('live');
    };
    source.onerror = () => say('waiting for the service');
  };
  let paused = false;
  button.hidden = false;
  button.addEventListener('click', () => {
    paused = !paused;
    button.textContent = paused ? 'Resume' : 'Pause';
    if (paused) { stop(); say('paused'); } else start();
  });
  // Nobody looks at a hidden page.
  document.addEventListener('visibilitychange', () => { if (document.hidden) stop(); else if (!paused) start(); });
  if (!document.hidden) start();
})();
