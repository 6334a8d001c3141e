//! The live page: every connection, pool and listener, now, without ssh, netstat or a backend.
//!
//! [`Builder::inspect`](crate::Builder::inspect) serves it at an address of its own;
//! [`Conntrack::inspect_router`] is an axum router to mount where you like. It reads the record and
//! changes nothing, unless [`Inspect::actions`] says so.
//!
//! | room | what |
//! |---|---|
//! | [`config`] | where it is served, what it may do |
//! | [`guard`] | who may ask |
//! | [`budget`] | what it may cost |
//! | [`query`] | what is asked for |
//! | [`table`], [`trend`] | all connections at a glance; the last minutes |
//! | [`view`] | what is shown, as data: the JSON |
//! | [`html`], [`text`] | how it is shown |
//! | [`action`] | what an operator can do |
//! | [`service`], [`server`] | requests and answers; the thread of its own |

mod action;
mod budget;
pub(crate) mod config;
mod guard;
mod html;
mod query;
pub(crate) mod server;
mod service;
mod table;
mod text;
mod trend;
mod view;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use http::StatusCode;
use tokio::sync::Semaphore;

use self::budget::Budget;
use self::config::{Inspect, Settings};
use self::guard::{Refusal, Token, refuse};
use self::query::{Filter, Format};
use self::table::Table;
use self::trend::Trend;
use self::view::{Closed, Connections, Link, One, Overview, Page, Pools, View};
use crate::clock::{Clock, Job};
use crate::config::ConfigError;
use crate::conntrack::Conntrack;
use crate::event::ConnectionId;
use crate::record::recorder::Watch;
use crate::record::{Recorder, lock};

/// Requests that are answered at a time; more are refused.
const REQUESTS: usize = 32;
/// Pages that are told of changes at a time; more have to reload.
const VIEWERS: usize = 8;
/// A table serves for so long, and for so many times what it cost.
const FRESH: Duration = Duration::from_secs(1);
const TIMES_ITS_COST: u32 = 100;
/// But no longer than that.
const STALE: Duration = Duration::from_secs(10);
/// Nobody looked for so long: the memory is given back.
const UNUSED: Duration = Duration::from_secs(30);

/// A page's inside.
pub(crate) struct Inspector {
    recorder: Recorder,
    settings: Settings,
    token: Token,
    budget: Budget,
    requests: Arc<Semaphore>,
    /// Whoever has it makes a page; the others wait, in order.
    turn: Arc<tokio::sync::Mutex<()>>,
    viewers: Arc<Semaphore>,
    table: Mutex<Option<Arc<Table>>>,
    trend: Trend,
    born: Instant,
    /// What follows the trend; it holds the page weakly.
    clock: OnceLock<Clock>,
    _watch: Watch,
}

/// Which page.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Overview,
    Connections,
    Connection(ConnectionId),
    Pools,
    Closed,
}

impl Inspector {
    pub(crate) fn new(recorder: &Recorder, inspect: &Inspect) -> Result<Arc<Self>, ConfigError> {
        let settings = inspect.settings()?;
        let bad = |help: &str| {
            let address = inspect.address.as_deref().unwrap_or("a router");
            ConfigError::new("inspect", address, help)
        };
        let token = Token::new().map_err(|error| {
            bad("the system gave no random numbers for the page's token").with_source(error)
        })?;
        let inspector = Arc::new(Self {
            recorder: recorder.clone(),
            settings,
            token,
            budget: Budget::new(Instant::now()),
            requests: Arc::new(Semaphore::new(REQUESTS)),
            turn: Arc::default(),
            viewers: Arc::new(Semaphore::new(VIEWERS)),
            table: Mutex::default(),
            trend: Trend::default(),
            born: Instant::now(),
            clock: OnceLock::new(),
            _watch: recorder.watch(inspect.timelines),
        });
        inspector.step();
        let weak = Arc::downgrade(&inspector);
        let follow = Job::new(trend::EVERY, move || {
            if let Some(inspector) = weak.upgrade() {
                inspector.step();
            }
        });
        let clock = Clock::start("conntrack-trend", follow)
            .map_err(|error| bad("its thread could not be started").with_source(error))?;
        let _ = inspector.clock.set(clock);
        Ok(inspector)
    }

    /// What happens every few seconds.
    fn step(&self) {
        self.trend.step(&self.recorder.stats());
        let mut table = lock(&self.table);
        let unused = table.take_if(|table| table.taken.elapsed() > UNUSED);
        drop(table);
        drop(unused);
    }

    /// All connections at a glance; another look where the last one is old. It may take long: not for a
    /// thread that others wait for.
    fn table(&self) -> Arc<Table> {
        let mut slot = lock(&self.table);
        let fresh = |table: &&Arc<Table>| {
            table.taken.elapsed() < (table.cost * TIMES_ITS_COST).clamp(FRESH, STALE)
        };
        if let Some(table) = slot.as_ref().filter(fresh) {
            return table.clone();
        }
        // The memory of the old one may serve the new one.
        *slot = None;
        let table = Arc::new(Table::take(&self.recorder));
        *slot = Some(table.clone());
        table
    }

    /// What a place shows now; none if there is no such thing.
    fn look(&self, place: &Place, filter: Filter) -> Option<Page<'_>> {
        let link = Link(self.settings.trace_link.as_deref());
        let (recorder, trend) = (&self.recorder, &self.trend);
        let view = match place {
            Place::Overview => View::Overview(Overview::take(recorder, trend, self.born.elapsed())),
            Place::Connections => {
                recorder.look();
                View::Connections(Connections::take(&self.table(), filter))
            }
            Place::Connection(id) => {
                let connection = recorder.find_connection(*id)?;
                View::Connection(Box::new(One::new(recorder, &connection, &link)))
            }
            Place::Pools => View::Pools(Pools::take(recorder, trend, filter.rows, &link)),
            Place::Closed => View::Closed(Closed::take(recorder, filter)),
        };
        Some(Page {
            version: view::VERSION,
            title: &self.settings.title,
            generated: view::unix(SystemTime::now()),
            view,
        })
    }

    /// The page as text of one of the formats. It may take long, and what it takes is owed.
    fn render(&self, place: &Place, filter: Filter, how: &How) -> Result<String, Refusal> {
        let before = budget::spent();
        let text = self.text(place, filter, how);
        let cost = budget::spent().saturating_sub(before);
        self.budget.owe(cost, Instant::now());
        text
    }

    fn text(&self, place: &Place, filter: Filter, how: &How) -> Result<String, Refusal> {
        let page = self.look(place, filter).ok_or_else(|| {
            let text = "no such connection: it was closed, and is not remembered any more";
            refuse(StatusCode::NOT_FOUND, text)
        })?;
        let frame = html::Frame {
            base: &how.base,
            nonce: &how.nonce,
            token: self.settings.actions.then(|| self.token.text()),
        };
        Ok(match how.format {
            Format::Html if how.content_only => html::content(&page, &frame).into_string(),
            Format::Html => html::document(&page, &frame),
            Format::Text => text::render(&page),
            Format::Json => {
                let json = serde_json::to_string(&page);
                json.map_err(|error| refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?
                    + "\n"
            }
        })
    }
}

/// How a page is rendered.
#[derive(Clone, Debug)]
struct How {
    format: Format,
    /// Only what changes.
    content_only: bool,
    base: String,
    nonce: String,
}

impl Conntrack {
    /// The live page as an axum router, to be mounted where you like; a `tower` service, too.
    ///
    /// It has the defaults of [`Inspect`]: it shows and does nothing, and answers only under
    /// `localhost`, names that end in `.localhost`, and IP addresses. It has no password: mount it where only operators
    /// get to.
    /// From here on it follows the last ten minutes, in a thread that ends with the router.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use axum::Router;
    /// use otel_conntrack::Conntrack;
    ///
    /// let conntrack = Conntrack::builder().build()?;
    /// let admin: Router = Router::new().nest("/debug/connections", conntrack.inspect_router()?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// | path | what |
    /// |---|---|
    /// | `/` | listeners, dialers, pools: states, limits, failures, families of x/net/trace |
    /// | `/connections` | all connections: `name`, `direction`, `host`, `state`, `older_than`, `idle_longer_than`; `sort`, `page`, `rows` |
    /// | `/connections/{id}` | one: what it serves, `TCP_INFO`, TLS, timeline, trace |
    /// | `/pools` | who holds, who waits, in order |
    /// | `/closed` | the last that were closed or failed |
    ///
    /// A browser gets HTML, `Accept: application/json` or `?format=json` JSON, and everybody else, such
    /// as curl, plain text. The JSON has a `version`: fields may be added within one. Times are in
    /// seconds, moments in seconds since 1970.
    ///
    /// It costs less than a hundredth of one processor: what it takes is timed, and who asks more often
    /// than that allows waits, or is told to come back (429). While it lives, connections also remember
    /// since when they are active.
    ///
    /// A page that is open holds its connection for up to 30 s at a time, so a graceful shutdown of the
    /// server that it is mounted in may take as long.
    ///
    /// # Errors
    ///
    /// When the system gives no thread or no random numbers.
    pub fn inspect_router(&self) -> Result<axum::Router, ConfigError> {
        self.inspect_router_with(Inspect::new())
    }

    /// The same with other settings.
    ///
    /// # Errors
    ///
    /// As [`inspect_router`](Self::inspect_router), and when a setting can't be used. A router has no
    /// address of its own.
    pub fn inspect_router_with(&self, inspect: Inspect) -> Result<axum::Router, ConfigError> {
        if let Some(address) = &inspect.address {
            return Err(ConfigError::new(
                "inspect_router",
                address,
                "a router is served wherever it is mounted; give an address to `Builder::inspect`",
            ));
        }
        let inspector = Inspector::new(&self.recorder, &inspect)?;
        let answer = move |request| {
            let inspector = inspector.clone();
            async move { inspector.answer(request).await }
        };
        // Nested, a router's own root takes a route; its fallback is for all below it.
        Ok(axum::Router::new()
            .route("/", axum::routing::any(answer.clone()))
            .fallback(answer))
    }
}
