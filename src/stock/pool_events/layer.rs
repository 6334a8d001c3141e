//! The `tracing` layer: a filter that wants one target, and a hook that formats an event at most once.
//!
//! hyper-util's pool mutex is held around most of the events. So here nothing blocks, nothing foreign is
//! called but the `Display` of the event's own message (with no lock of ours held), and the text goes
//! into a buffer that the thread keeps.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt::{self, Write as _};
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::metadata::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::Filtered;
use tracing_subscriber::layer::{Context, Filter, Layer};
use tracing_subscriber::registry::LookupSpan;

use super::machine::Input;
use super::message::{self, KNOWN, KeyRef, PoolMessage, TARGET};
use super::request_watch::Watching;
use super::{KeyCell, Shared, Stepped};

/// The layer with its filter, from [`PoolEvents::layer`](super::PoolEvents::layer).
pub type PoolEventsLayer<S> = Filtered<PoolWatch, PoolFilter, S>;

/// What a layer keeps alive.
pub(crate) type Keep = Arc<dyn Any + Send + Sync>;

pub(super) fn filtered<S>(shared: Arc<Shared>, keep: Option<Keep>) -> PoolEventsLayer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let hears = !shared.layered.swap(true, Ordering::Relaxed);
    let watch = PoolWatch {
        shared,
        hears,
        _keep: keep,
    };
    watch.with_filter(PoolFilter { _private: () })
}

/// Wants the events of hyper-util's pool, at every level, and nothing else.
#[derive(Clone, Debug)]
pub struct PoolFilter {
    _private: (),
}

fn wanted(metadata: &Metadata<'_>) -> bool {
    metadata.is_event()
        && metadata
            .target()
            .strip_prefix(TARGET)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

impl<S> Filter<S> for PoolFilter {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        wanted(metadata)
    }

    // Once per call site: what nobody else wants costs nothing afterwards.
    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        if wanted(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }
}

/// The layer without its filter, with which it would have to look at every event of the process.
pub struct PoolWatch {
    shared: Arc<Shared>,
    /// It is the only one, or was made when there was none.
    hears: bool,
    _keep: Option<Keep>,
}

impl PoolWatch {
    pub(super) fn hears(&self) -> bool {
        self.hears
    }
}

impl Drop for PoolWatch {
    fn drop(&mut self) {
        if self.hears {
            self.shared.layered.store(false, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for PoolWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolWatch").finish_non_exhaustive()
    }
}

impl<S: Subscriber> Layer<S> for PoolWatch {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if !self.hears {
            return;
        }
        let seen = HERE.try_with(|here| self.shared.on_event(event, here));
        if seen.is_err() {
            // The thread ends, and drops a connection last. What a thread keeps does not matter then.
            self.shared.on_event(event, &Here::default());
        }
    }
}

/// What a thread keeps.
#[derive(Default)]
struct Here {
    /// Taken out while in use, so that nothing can find it borrowed.
    text: Cell<String>,
    last: RefCell<Option<Last>>,
    ignored: Cell<bool>,
    blocking_reqwest: Cell<Option<bool>>,
    /// Per layer, mostly one. Empty unless a checkout is under way.
    open: RefCell<Vec<Open>>,
    /// The request whose future runs, if anybody watches it.
    watch: RefCell<Option<Watching>>,
}

/// Whom the thread's last message was about, as it was spelt there.
struct Last {
    layer: u64,
    text: String,
    scheme: String,
    authority: String,
    cell: Arc<KeyCell>,
}

/// What the thread's last message left open.
struct Open {
    layer: u64,
    cell: Arc<KeyCell>,
    step: Step,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A checkout looks into the list. Nothing but its own messages comes before it is done.
    Take,
    /// A connection came back. What becomes of it is said next, under the pool's mutex.
    Put,
    /// A request began to wait. If it is refused a dial, that is said next. `refused` requests were
    /// before it.
    Wait { refused: u64 },
}

thread_local! {
    static HERE: Here = Here::default();
}

/// Leaves out what clients do on this thread, from now on: for a thread that only works for a telemetry
/// exporter.
pub fn ignore_this_thread() {
    // At a thread's end there is nothing to leave out any more.
    let _ = HERE.try_with(|here| here.ignored.set(true));
}

/// Puts the watch of the request whose future runs on this thread; the one before comes back. At a
/// thread's end nobody is watched any more.
pub(super) fn put_watch(watch: Option<Watching>) -> Option<Watching> {
    HERE.try_with(|here| here.watch.replace(watch))
        .ok()
        .flatten()
}

impl Here {
    fn on_blocking_reqwest(&self) -> bool {
        self.blocking_reqwest.get().unwrap_or_else(|| {
            let is = std::thread::current().name() == Some("reqwest-internal-sync-runtime");
            self.blocking_reqwest.set(Some(is));
            is
        })
    }

    fn close(&self, layer: u64) -> Option<(Arc<KeyCell>, Step)> {
        let mut open = self.open.borrow_mut();
        let at = open.iter().position(|open| open.layer == layer)?;
        let Open { cell, step, .. } = open.swap_remove(at);
        Some((cell, step))
    }

    fn open(&self, layer: u64, cell: Arc<KeyCell>, step: Step) {
        self.open.borrow_mut().push(Open { layer, cell, step });
    }
}

/// Whether this is telemetry's own doing. At a thread's end nobody knows any more.
#[cfg(feature = "otel")]
fn is_suppressed() -> bool {
    use crate::observer::shielded;
    shielded(opentelemetry::Context::is_current_telemetry_suppressed).unwrap_or(false)
}

#[cfg(not(feature = "otel"))]
const fn is_suppressed() -> bool {
    false
}

impl Shared {
    fn on_event(&self, event: &Event<'_>, here: &Here) {
        if here.ignored.get() || !self.config.blocking_reqwest && here.on_blocking_reqwest() {
            return;
        }
        if is_suppressed() {
            return self.leave_out(event);
        }
        let callsite = event.metadata().callsite();
        match self.callsites.look_up(&callsite) {
            Some(known) if known.index == UNKNOWN => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
            }
            Some(known) => match message::keyless_at(known.index) {
                Some(message) => self.keyless(message),
                None => match self.goes_on(known, here) {
                    Some((message, cell)) => self.keyed(message, &cell, here),
                    None => self.read(event, Some(known), here),
                },
            },
            None => self.read(event, None, here),
        }
    }

    #[cold]
    fn leave_out(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        if let (_, Some(key)) = message::parse(&text.0) {
            let mut normal = String::new();
            key.push_normal(&mut normal);
            self.suppressed(&normal);
        }
    }

    fn read(&self, event: &Event<'_>, known: Option<&Known>, here: &Here) {
        let mut text = Text(here.text.take());
        text.0.clear();
        event.record(&mut text);
        let index = known.map(|known| known.index).or_else(|| {
            let index = message::index_of(&text.0);
            self.callsites
                .remember(event.metadata().callsite(), index.unwrap_or(UNKNOWN));
            index
        });
        if let Some(index) = index
            && let Some((message, cell)) = self.as_before(index, &text.0, here)
        {
            if let Some(known) = known {
                known.said(true);
            }
            self.keyed(message, &cell, here);
            here.text.set(text.0);
            return;
        }
        // A call site that says now this and now that is read afresh.
        let parsed = index.and_then(|index| message::parse_as(index, &text.0));
        if let Some(known) = known {
            known.said(parsed.is_some());
        }
        match parsed.unwrap_or_else(|| message::parse(&text.0)) {
            (PoolMessage::Unknown, _) => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
            }
            (message, Some(key)) => {
                if let Some(cell) = self.cell_here(key, here) {
                    self.keyed(message, &cell, here);
                }
            }
            (message, None) => self.keyless(message),
        }
        here.text.set(text.0);
    }

    /// The message, if it can only be the next one of what the thread's message before began: then it
    /// is about the same key, and need not be formatted.
    fn goes_on(&self, known: &Known, here: &Here) -> Option<(PoolMessage, Arc<KeyCell>)> {
        let open = here.open.borrow();
        let open = open.iter().find(|open| open.layer == self.id)?;
        let message = message::plain_at(known.index).filter(|_| known.is_constant())?;
        let same = match open.step {
            Step::Take => matches!(
                message,
                PoolMessage::RemovingClosed | PoolMessage::RemovingExpired | PoolMessage::Reuse
            ),
            Step::Put => matches!(
                message,
                PoolMessage::FoundWaiter
                    | PoolMessage::MaxIdlePerHost
                    | PoolMessage::Pooling
                    | PoolMessage::PutCanceledWaiter
            ),
            Step::Wait { .. } => false,
        };
        // It may have been excluded since.
        let same = same && !open.cell.excluded.load(Ordering::Relaxed);
        same.then(|| (message, open.cell.clone()))
    }

    /// The message, if it is about the key of the thread's message before, spelt alike.
    fn as_before(
        &self,
        index: usize,
        text: &str,
        here: &Here,
    ) -> Option<(PoolMessage, Arc<KeyCell>)> {
        let last = here.last.borrow();
        let last = last.as_ref().filter(|last| last.layer == self.id)?;
        let message = message::about(index, text, &last.text)?;
        // It may have been excluded since.
        let excluded = last.cell.excluded.load(Ordering::Relaxed);
        (!excluded).then(|| (message, last.cell.clone()))
    }

    /// The key's cell: mostly that of the thread's message before.
    fn cell_here(&self, key: KeyRef<'_>, here: &Here) -> Option<Arc<KeyCell>> {
        let mut last = here.last.borrow_mut();
        if let Some(last) = &*last
            && last.layer == self.id
            && last.authority == key.authority
            && last.scheme == key.scheme
        {
            // It may have been excluded since.
            let excluded = last.cell.excluded.load(Ordering::Relaxed);
            return (!excluded).then(|| last.cell.clone());
        }
        let mut normal = String::with_capacity(key.scheme.len() + 3 + key.authority.len());
        key.push_normal(&mut normal);
        let cell = self.cell(&normal, key)?;
        *last = Some(Last {
            layer: self.id,
            text: key.to_text(),
            scheme: key.scheme.into(),
            authority: key.authority.into(),
            cell: cell.clone(),
        });
        Some(cell)
    }

    fn keyed(&self, message: PoolMessage, cell: &Arc<KeyCell>, here: &Here) {
        let before = here.close(self.id);
        let (mut from_list, mut at_once) = (false, false);
        match before {
            Some((of, Step::Take)) => from_list = Arc::ptr_eq(&of, cell),
            Some((of, Step::Wait { refused })) => {
                at_once = message == PoolMessage::Http2AlreadyConnecting && Arc::ptr_eq(&of, cell);
                if !at_once {
                    self.step(&of, Input::DialsItself { refused });
                }
            }
            Some((_, Step::Put)) | None => {}
        }
        let stepped = self.step(
            cell,
            Input::Message {
                message,
                from_list,
                at_once,
            },
        );
        if let Some(watch) = &mut *here.watch.borrow_mut() {
            let at = || stepped.at.unwrap_or_else(Instant::now);
            watch.told(self.id, cell, message, from_list, at);
        }
        match message {
            PoolMessage::Take { .. } => here.open(self.id, cell.clone(), Step::Take),
            // Closed and expired ones are thrown out while it looks.
            PoolMessage::RemovingClosed | PoolMessage::RemovingExpired => {
                here.open(self.id, cell.clone(), Step::Take);
            }
            PoolMessage::PutAdd | PoolMessage::PutCanceledWaiter => {
                here.open(self.id, cell.clone(), Step::Put);
            }
            // Over TLS a refusal can come at any time, for any request: after a handshake.
            PoolMessage::CheckoutWaiting if cell.key.scheme() == "http" => {
                let Stepped { refused, .. } = stepped;
                here.open(self.id, cell.clone(), Step::Wait { refused });
            }
            _ => {}
        }
    }

    fn keyless(&self, message: PoolMessage) {
        if message == PoolMessage::PoolClosed {
            self.pool_closed();
        }
    }
}

/// The message of an event, as text.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            // A `String` takes everything.
            let _ = write!(self.0, "{value:?}");
        }
    }
}

const UNKNOWN: usize = KNOWN;
const SLOTS: usize = 64;

/// What a call site says.
struct Known {
    callsite: Identifier,
    index: usize,
    /// How often it was read and said that; [`MIXED`] once it said something else.
    said: AtomicU32,
}

/// So often a call site is read before it is believed to say always the same.
const PROBATION: u32 = 32;
const MIXED: u32 = u32::MAX;

impl Known {
    /// It was read. Relaxed: it guards nothing.
    fn said(&self, that: bool) {
        match self.said.load(Ordering::Relaxed) {
            _ if !that => self.said.store(MIXED, Ordering::Relaxed),
            said if said < PROBATION => {
                // Lost updates only prolong it, but none may hide that it is mixed.
                let next = said + 1;
                let order = Ordering::Relaxed;
                let _ = self.said.compare_exchange(said, next, order, order);
            }
            _ => {}
        }
    }

    fn is_constant(&self) -> bool {
        self.said.load(Ordering::Relaxed) == PROBATION
    }
}

/// Which message a call site says, found without a lock. hyper-util has 19 of them; what does not fit
/// is read afresh each time.
pub(super) struct Callsites {
    slots: [OnceLock<Known>; SLOTS],
}

impl Callsites {
    pub(super) fn new() -> Self {
        Self {
            slots: [const { OnceLock::new() }; SLOTS],
        }
    }

    fn slots(&self, callsite: &Identifier) -> impl Iterator<Item = &OnceLock<Known>> {
        let mut hasher = Address(0);
        callsite.hash(&mut hasher);
        let first = hasher.finish() as usize % SLOTS;
        (0..SLOTS).map(move |offset| &self.slots[(first + offset) % SLOTS])
    }

    fn look_up(&self, callsite: &Identifier) -> Option<&Known> {
        for slot in self.slots(callsite) {
            let known = slot.get()?;
            if known.callsite == *callsite {
                return Some(known);
            }
        }
        None
    }

    fn remember(&self, callsite: Identifier, index: usize) {
        for slot in self.slots(&callsite) {
            let known = slot.get_or_init(|| Known {
                callsite: callsite.clone(),
                index,
                said: AtomicU32::new(0),
            });
            if known.callsite == callsite {
                return;
            }
        }
    }
}

/// Hashes the address of a static: cheap, and there is nobody to defend against.
struct Address(u64);

impl Hasher for Address {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn write_usize(&mut self, address: usize) {
        self.0 ^= address as u64;
    }

    fn finish(&self) -> u64 {
        self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32
    }
}
