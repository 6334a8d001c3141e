(() => {
  const main = document.querySelector('main'), status = document.getElementById('status'), button = document.getElementById('pause');
  if (!main || !window.EventSource) return;
  const keyOf = node => node.nodeType === 1 ? node.dataset.key : undefined;
  // Makes a like b and touches no more than it has to: focus, selection and scrolling stay.
  const like = (a, b) => {
    if (a.isEqualNode(b)) return;
    if (a.nodeType !== b.nodeType || a.nodeName !== b.nodeName || keyOf(a) !== keyOf(b)) return a.replaceWith(b);
    if (a.nodeType !== 1) { a.data = b.data; return; }
    for (const { name } of [...a.attributes]) if (name !== 'open' && !b.hasAttribute(name)) a.removeAttribute(name);
    for (const { name, value } of b.attributes) if (a.getAttribute(name) !== value) a.setAttribute(name, value);
    const wanted = new Set([...b.children].map(keyOf)), keyed = new Map();
    // What is gone goes first, so that what stays need not move.
    for (const child of [...a.children]) {
      const key = keyOf(child);
      if (key && !wanted.has(key)) child.remove(); else if (key) keyed.set(key, child);
    }
    let at = a.firstChild;
    for (const child of [...b.childNodes]) {
      const key = keyOf(child), old = keyed.get(key);
      keyed.delete(key);
      if (key && !old) { a.insertBefore(child, at); continue; }
      if (old && old !== at) a.insertBefore(old, at);
      const now = old || at;
      if (!now) { a.append(child); continue; }
      at = now.nextSibling;
      like(now, child);
    }
    while (at) { const next = at.nextSibling; at.remove(); at = next; }
  };
  const update = html => {
    const next = main.cloneNode(false), focus = document.activeElement;
    next.append(...new DOMParser().parseFromString(html, 'text/html').body.childNodes);
    like(main, next);
    // What moves loses it.
    if (focus !== document.activeElement && main.contains(focus)) focus.focus({ preventScroll: true });
  };
  let source, late, paused = false;
  const say = (state, text) => {
    clearTimeout(late);
    status.className = state;
    if (status.textContent !== text) status.textContent = text;
  };
  const stop = () => { clearTimeout(late); if (source) source.close(); source = null; };
  const start = () => {
    stop();
    const url = new URL(location.href);
    url.searchParams.set('live', '1');
    source = new EventSource(url.pathname + url.search);
    source.addEventListener('update', event => { update(event.data); say('live', 'live'); });
    source.addEventListener('gone', () => { stop(); say('late', 'no longer there'); });
    source.onerror = () => {
      clearTimeout(late);
      // A stream ends now and then and begins anew at once: worth a word only if it does not. One that was
      // refused does not begin by itself.
      const refused = source.readyState === EventSource.CLOSED;
      late = setTimeout(() => { say('late', 'waiting for the service'); if (refused) late = setTimeout(start, 8000); }, 4000);
    };
  };
  button.hidden = false;
  button.addEventListener('click', () => {
    paused = !paused;
    button.textContent = paused ? 'Resume' : 'Pause';
    if (paused) { stop(); say('paused', 'paused'); } else start();
  });
  // Nobody looks at a hidden page, or at one that was left.
  const look = () => { if (document.hidden) stop(); else if (!paused) start(); };
  document.addEventListener('visibilitychange', look);
  addEventListener('pagehide', stop);
  addEventListener('pageshow', event => { if (event.persisted) look(); });
  look();
})();
