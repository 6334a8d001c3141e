//! A real browser for tests: Chromium without a window, told what to do over the DevTools protocol.
//!
//! One browser serves all tests of a process; each has a [`Tab`] in a context of its own, without the
//! others' cache and storage. The protocol goes through pipes and not through a port: nobody else can
//! talk to the browser, and it ends with the process, however that ends, because its pipe does.
//! It asks no other host for anything: all names but [`FOREIGN`] and loopback ones are unknown to it.
//!
//! A tab remembers all that went wrong in it: [`Tab::complaints`].

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

/// A name that is 127.0.0.1 to the browser, and that no page of ours knows.
pub const FOREIGN: &str = "evil.example";

/// Longer than anything here takes, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether `CONNTRACK_BROWSER` asks for these tests; says so if not.
pub fn wanted() -> bool {
    let wanted = std::env::var("CONNTRACK_BROWSER").is_ok_and(|value| !value.is_empty());
    if !wanted {
        println!(
            "skipped: set CONNTRACK_BROWSER=1 (or to a browser's path) to run it in a real Chromium"
        );
    }
    wanted
}

// === the browser ===

struct Browser {
    commands: Mutex<ChildStdin>,
    next: AtomicU64,
    shared: Arc<Shared>,
    log: PathBuf,
}

#[derive(Default)]
struct Shared {
    answers: Mutex<HashMap<u64, oneshot::Sender<Value>>>,
    sessions: Mutex<HashMap<String, Arc<Session>>>,
    gone: Mutex<bool>,
}

/// What happened in a tab.
#[derive(Default)]
struct Session {
    events: Mutex<Vec<Value>>,
    more: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A test that failed has nothing to do with the others.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn browser() -> &'static Browser {
    static BROWSER: OnceLock<Browser> = OnceLock::new();
    BROWSER.get_or_init(Browser::start)
}

impl Browser {
    fn start() -> Self {
        let path = std::env::var("CONNTRACK_BROWSER").unwrap_or_default();
        let path = if path == "1" { "chromium" } else { &path };
        let name = format!("browser-{}", std::process::id());
        let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&name);
        let log = profile.with_extension("log");
        fs::create_dir_all(&profile).unwrap();
        // It reads commands from descriptor 3 and writes to 4. Once it has ended, its files go; its
        // log only if it ended well.
        let script = r#"
            profile=$1 log=$2
            shift 2
            "$@" 3<&0 4>&1 </dev/null >/dev/null && rm -f "$log"
            rm -rf "$profile"
        "#;
        let mut child = Command::new("sh")
            .args(["-c", script, "sh"])
            .args([&profile, &log])
            .arg(path)
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg(format!(
                "--host-resolver-rules=MAP {FOREIGN} 127.0.0.1, MAP *.localhost 127.0.0.1, \
                 MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
            ))
            .args([
                "--headless=new",
                "--no-sandbox",
                "--remote-debugging-pipe",
                "--no-proxy-server",
                "--no-first-run",
                "--no-default-browser-check",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-default-apps",
                "--disable-dev-shm-usage",
                "--disable-extensions",
                // The browser's own guard of the local network, behind which a page's would not be seen.
                "--disable-features=LocalNetworkAccessChecks",
                "--disable-gpu",
                "--disable-sync",
                "--force-color-profile=srgb",
                "--hide-scrollbars",
                "--lang=en",
                "--password-store=basic",
                "about:blank",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let shared = Arc::<Shared>::default();
        let messages = BufReader::new(child.stdout.take().unwrap());
        let commands = child.stdin.take().unwrap();
        let of_reader = shared.clone();
        std::thread::spawn(move || {
            for message in messages.split(0) {
                let Ok(message) = message else { break };
                of_reader.take(serde_json::from_slice(&message).unwrap());
            }
            *lock(&of_reader.gone) = true;
            lock(&of_reader.answers).clear();
            let _ = child.wait();
        });
        Self {
            commands: Mutex::new(commands),
            next: AtomicU64::new(1),
            shared,
            log,
        }
    }

    /// Sends a command; its answer comes when it comes.
    fn send(&self, session: Option<&str>, method: &str, params: Value) -> oneshot::Receiver<Value> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        lock(&self.shared.answers).insert(id, sender);
        let mut command = json!({ "id": id, "method": method, "params": params });
        if let Some(session) = session {
            command["sessionId"] = session.into();
        }
        let mut bytes = command.to_string().into_bytes();
        bytes.push(0);
        let sent = lock(&self.commands).write_all(&bytes);
        if sent.is_err() || *lock(&self.shared.gone) {
            lock(&self.shared.answers).clear();
        }
        receiver
    }

    async fn call(
        &self,
        session: Option<&str>,
        method: &str,
        params: Value,
    ) -> Result<Value, String> {
        // Longer than who waits for a condition, and can say for which.
        let answer = timeout(PATIENCE * 2, self.send(session, method, params)).await;
        let answer = answer.unwrap_or_else(|_| panic!("the browser does not answer to {method}"));
        let Ok(mut answer) = answer else {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            panic!(
                "the browser is not there (on Debian: apt-get install chromium fonts-dejavu-core): {log}"
            );
        };
        match answer.get("error") {
            Some(error) => Err(format!("{method}: {error}")),
            None => Ok(answer["result"].take()),
        }
    }
}

impl Shared {
    fn take(&self, mut message: Value) {
        if let Some(id) = message["id"].as_u64() {
            if let Some(sender) = lock(&self.answers).remove(&id) {
                let _ = sender.send(message);
            }
            return;
        }
        let Some(session) = message["sessionId"].as_str() else {
            return;
        };
        let Some(session) = lock(&self.sessions).get(session).cloned() else {
            return;
        };
        lock(&session.events).push(message.take());
        session.more.notify_waiters();
    }
}

// === a tab ===

/// A tab, alone in its context. Dropped, it is closed.
pub struct Tab {
    context: String,
    id: String,
    session: Arc<Session>,
}

impl Drop for Tab {
    fn drop(&mut self) {
        lock(&browser().shared.sessions).remove(&self.id);
        let context = json!({ "browserContextId": self.context });
        drop(browser().send(None, "Target.disposeBrowserContext", context));
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

impl Tab {
    pub async fn open() -> Self {
        let call = async |method, params| browser().call(None, method, params).await.unwrap();
        let made = call("Target.createBrowserContext", json!({})).await;
        let context = text(&made["browserContextId"]);
        let target = json!({
            "url": "about:blank", "browserContextId": context, "newWindow": true, "width": 1280, "height": 900,
        });
        let target = call("Target.createTarget", target).await["targetId"].take();
        let attach = json!({ "targetId": target, "flatten": true });
        let id = text(&call("Target.attachToTarget", attach).await["sessionId"]);
        let session = Arc::<Session>::default();
        lock(&browser().shared.sessions).insert(id.clone(), session.clone());
        let tab = Self {
            context,
            id,
            session,
        };
        for domain in ["Page", "Runtime", "Log", "Network", "Audits"] {
            tab.call(&format!("{domain}.enable"), json!({})).await;
        }
        // As if its window were the one in front.
        let focus = json!({ "enabled": true });
        tab.call("Emulation.setFocusEmulationEnabled", focus).await;
        let size = json!({ "width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": false });
        tab.call("Emulation.setDeviceMetricsOverride", size).await;
        tab
    }

    /// Does what the protocol calls so.
    pub async fn call(&self, method: &str, params: Value) -> Value {
        self.try_call(method, params).await.unwrap()
    }

    async fn try_call(&self, method: &str, params: Value) -> Result<Value, String> {
        browser().call(Some(&self.id), method, params).await
    }

    /// Waits for an event after the first `after` ones.
    pub async fn event(&self, after: usize, is: impl Fn(&Value) -> bool) -> Value {
        let wait = async {
            loop {
                let more = self.session.more.notified();
                tokio::pin!(more);
                // From here on none is missed.
                more.as_mut().enable();
                if let Some(event) = lock(&self.session.events)[after..].iter().find(|e| is(e)) {
                    return event.clone();
                }
                more.await;
            }
        };
        match timeout(PATIENCE, wait).await {
            Ok(event) => event,
            Err(_) => panic!("this event never comes; {:?}", self.complaints()),
        }
    }

    /// How many events there were so far.
    pub fn events(&self) -> usize {
        lock(&self.session.events).len()
    }

    /// How many of this name there were so far.
    pub fn count(&self, method: &str) -> usize {
        let events = lock(&self.session.events);
        events.iter().filter(|e| e["method"] == method).count()
    }

    // === where it is ===

    /// Goes there, and waits until all is loaded.
    pub async fn goto(&self, url: &str) {
        self.leads_on(async {
            let gone = self.call("Page.navigate", json!({ "url": url })).await;
            assert_eq!(gone["errorText"], Value::Null, "{url}");
        })
        .await;
    }

    /// Does something that leads to another page, and waits until all of it is loaded.
    pub async fn leads_on(&self, act: impl Future<Output = ()>) {
        let before = self.events();
        act.await;
        self.event(before, |e| e["method"] == "Page.loadEventFired")
            .await;
    }

    /// The document as it came: its status and its HTML.
    pub async fn document(&self) -> (u64, String) {
        let last = {
            let events = lock(&self.session.events);
            let is = |e: &&Value| {
                e["method"] == "Network.responseReceived" && e["params"]["type"] == "Document"
            };
            events.iter().rfind(is).unwrap()["params"].clone()
        };
        let id = json!({ "requestId": last["requestId"] });
        let body = self.call("Network.getResponseBody", id).await;
        assert_eq!(body["base64Encoded"], false);
        (
            last["response"]["status"].as_u64().unwrap(),
            text(&body["body"]),
        )
    }

    // === what it shows ===

    /// An expression's value; a promise's, if it is one.
    pub async fn eval(&self, expression: &str) -> Value {
        match self.try_eval(expression).await {
            Ok(value) => value,
            Err(error) => panic!("{error}: {expression}"),
        }
    }

    async fn try_eval(&self, expression: &str) -> Result<Value, String> {
        let params =
            json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let mut done = self.try_call("Runtime.evaluate", params).await?;
        match done.get("exceptionDetails") {
            Some(thrown) => Err(thrown.to_string()),
            None => Ok(done["result"]["value"].take()),
        }
    }

    /// Waits until the condition holds, which is looked at whenever the document changes.
    pub async fn until(&self, condition: &str) {
        let look = format!(
            "new Promise(done => {{
               const look = () => {{ if ({condition}) {{ watch.disconnect(); done(true); }} }};
               const watch = new MutationObserver(look);
               watch.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
               look();
             }})"
        );
        let wait = async {
            // The page may go on to another one meanwhile.
            let moved = ["context", "navigated", "collected"];
            while let Err(error) = self.try_eval(&look).await {
                assert!(
                    moved.iter().any(|word| error.contains(word)),
                    "{condition}: {error}"
                );
            }
        };
        if timeout(PATIENCE, wait).await.is_err() {
            let shown = self.try_eval("document.body.innerText").await;
            panic!(
                "{condition}: never; it shows {shown:?}, and complains {:?}",
                self.complaints()
            );
        }
    }

    /// The accessibility tree, as a screen reader gets it.
    pub async fn accessibility(&self) -> Vec<Node> {
        self.call("Accessibility.enable", json!({})).await;
        let tree = self.call("Accessibility.getFullAXTree", json!({})).await;
        let nodes = tree["nodes"].as_array().unwrap().iter();
        let node = |node: &Value| Node {
            role: text(&node["role"]["value"]),
            name: text(&node["name"]["value"]),
            properties: node["properties"].clone(),
        };
        nodes
            .filter(|node| node["ignored"] == false)
            .map(node)
            .collect()
    }

    /// Keeps a picture of the whole page.
    pub async fn picture(&self, path: &Path) {
        let height = self.eval("document.documentElement.scrollHeight").await;
        let clip = json!({ "x": 0, "y": 0, "width": 1280, "height": height, "scale": 1 });
        let params = json!({ "format": "png", "clip": clip, "captureBeyondViewport": true });
        let picture = self.call("Page.captureScreenshot", params).await;
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, base64(picture["data"].as_str().unwrap())).unwrap();
    }

    // === what a person does ===

    /// Clicks into the middle of the element.
    pub async fn click(&self, selector: &str) {
        let at = self
            .eval(&format!(
                "(() => {{
                   const element = document.querySelector({selector:?});
                   element.scrollIntoView({{ block: 'center', inline: 'center', behavior: 'instant' }});
                   const {{ x, y, width, height }} = element.getBoundingClientRect();
                   return {{ x: x + width / 2, y: y + height / 2 }};
                 }})()"
            ))
            .await;
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({ "type": kind, "x": at["x"], "y": at["y"], "button": "left", "clickCount": 1 });
            self.call("Input.dispatchMouseEvent", event).await;
        }
    }

    /// Presses a key: `Tab`, `Enter`, or `Escape`.
    pub async fn press(&self, key: &str) {
        let (code, typed) = match key {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            "Escape" => (27, ""),
            _ => panic!("{key} has no code here"),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event =
                json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            if kind == "keyDown" && !typed.is_empty() {
                event["text"] = typed.into();
            }
            self.call("Input.dispatchKeyEvent", event).await;
        }
    }

    /// Types into what has the focus.
    pub async fn type_text(&self, text: &str) {
        self.call("Input.insertText", json!({ "text": text })).await;
    }

    // === what it says about itself ===

    /// Everything that was said on the console, thrown, refused, blocked or failed, and every dialog.
    pub fn complaints(&self) -> Vec<String> {
        let events = lock(&self.session.events);
        events.iter().filter_map(complaint).collect()
    }

    /// The URLs that were asked for.
    pub fn requests(&self) -> Vec<String> {
        let events = lock(&self.session.events);
        let asked = events
            .iter()
            .filter(|e| e["method"] == "Network.requestWillBeSent");
        asked
            .map(|e| text(&e["params"]["request"]["url"]))
            .collect()
    }
}

/// Something that a screen reader would say.
#[derive(Debug)]
pub struct Node {
    pub role: String,
    pub name: String,
    pub properties: Value,
}

fn complaint(event: &Value) -> Option<String> {
    let params = &event["params"];
    let said = match event["method"].as_str()? {
        "Runtime.consoleAPICalled" => params["args"].to_string(),
        "Runtime.exceptionThrown" => params["exceptionDetails"].to_string(),
        "Log.entryAdded" => format!("{} {}", params["entry"]["text"], params["entry"]["url"]),
        "Audits.issueAdded" => params["issue"].to_string(),
        "Page.javascriptDialogOpening" => format!("dialog: {}", params["message"]),
        // What is left behind by going on.
        "Network.loadingFailed" if params["canceled"] == true => return None,
        "Network.loadingFailed" => params.to_string(),
        "Network.responseReceived" => {
            let response = &params["response"];
            let status = response["status"]
                .as_u64()
                .filter(|status| *status >= 400)?;
            format!("{status} {}", response["url"])
        }
        _ => return None,
    };
    Some(said)
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |byte| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let (mut bytes, mut bits, mut have) = (Vec::new(), 0_u32, 0);
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        bits = bits << 6 | u32::from(digit(byte));
        have += 6;
        if have >= 8 {
            have -= 8;
            bytes.push((bits >> have) as u8);
        }
    }
    bytes
}
