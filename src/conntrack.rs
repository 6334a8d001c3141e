//! [`Conntrack`]: the facade that hands out sources and snapshots.

use std::future::Future;
use std::sync::Arc;

use crate::builder::Builder;
use crate::config::{ConfigError, valid_name};
use crate::event::{ConnectionId, Direction, Endpoint, Target};
use crate::io::{Endpoints, TrackedIo};
use crate::outbound::{scope_of_exporter, track};
use crate::record::Recorder;
use crate::record::stats::{ConnectionSnapshot, Stats};

/// Sees connections. Cheap to clone; every clone is the same.
///
/// Made by [`Conntrack::builder`]: [`init()`](Builder::init) sets OpenTelemetry up as well,
/// [`build()`](Builder::build) uses what the application has, or nothing.
///
/// It hands out the sources: [`listener`](Self::listener) for inbound connections,
/// [`dialer`](Self::dialer) and [`connector`](Self::connector) for outbound ones. What they do is in
/// [`stats`](Self::stats) and [`connections`](Self::connections), in spans and metrics, and goes to
/// [observers](crate::Observer). Sources and connections stay valid when the last `Conntrack` is
/// dropped.
#[derive(Clone)]
pub struct Conntrack {
    pub(crate) recorder: Recorder,
    /// What the telemetry needs alive: its clocks. Their drop stops them.
    pub(crate) _keep: Arc<dyn std::any::Any + Send + Sync>,
    #[cfg(feature = "stock")]
    pub(crate) stock: Arc<crate::stock::pool::Slot>,
    /// Its drop ends the live page.
    #[cfg(feature = "inspect")]
    pub(crate) page: Option<Arc<crate::inspect::server::Serving>>,
}

impl Conntrack {
    /// Starts to set one up.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// A tracked listener under this name: bind it or wrap one.
    #[cfg(feature = "net")]
    pub fn listener(&self, name: &str) -> crate::ListenerBuilder {
        crate::ListenerBuilder::new(self.recorder.clone(), name)
    }

    /// Serves HTTP/1 and HTTP/2 on a listener: a `tower` service, such as axum's `Router`. See [`Server`].
    ///
    /// [`Server`]: crate::Server
    #[cfg(feature = "server")]
    pub fn serve<L: crate::Accept, S>(
        &self,
        listener: crate::Listener<L>,
        service: S,
    ) -> crate::ServerBuilder<L, S> {
        // The listener has the record; which `Conntrack` it came from is its own business.
        crate::ServerBuilder::new(listener, service)
    }

    /// A tracked dialer under this name: opens connections for any protocol.
    #[cfg(feature = "net")]
    pub fn dialer(&self, name: &str) -> crate::DialerBuilder {
        crate::DialerBuilder::new(self.recorder.clone(), name)
    }

    /// Tracks what a tower connector opens, under this name.
    #[cfg(feature = "hyper")]
    pub fn connector(&self, name: &str) -> crate::ConnectorBuilder {
        crate::ConnectorBuilder::new(self.recorder.clone(), name)
    }

    /// A pooling HTTP client under this name: limits, queues, events.
    #[cfg(feature = "transport")]
    pub fn transport(&self, name: &str) -> crate::TransportBuilder {
        crate::TransportBuilder::new(self.recorder.clone(), name)
    }

    /// Tracks an unmodified reqwest client's connections under this name: a layer for its connector.
    /// [`ReqwestBuilderExt::conntrack`](crate::ReqwestBuilderExt::conntrack) is this in one line.
    #[cfg(feature = "reqwest")]
    pub fn reqwest(&self, name: &str) -> crate::stock::ReqwestLayerBuilder {
        crate::stock::ReqwestLayerBuilder::new(self.recorder.clone(), self.stock.clone(), name)
    }

    /// A layer over a reqwest client whose connections are tracked under this name: it sees the
    /// requests. From here on, new connections of this name count as idle until a request has them.
    ///
    /// # Errors
    ///
    /// When the name is empty, longer than 100 bytes or has control characters.
    #[cfg(feature = "reqwest")]
    pub fn reqwest_requests(
        &self,
        name: &str,
    ) -> Result<crate::stock::ReqwestRequests, ConfigError> {
        crate::stock::ReqwestRequests::new(&self.recorder, &self.stock, name)
    }

    /// A `tracing` layer that hears the pools of unmodified reqwest and hyper-util clients, for a
    /// subscriber of your own. [`Builder::init`] installs it, if
    /// [`stock_pool_events`](Builder::stock_pool_events) says so.
    ///
    /// From then on these pools are one more pool, `stock`: its events go to the
    /// [observers](crate::Observer), its counts are in [`stats`](Self::stats) and in the metrics.
    /// [`stock::pool_events`](crate::stock::pool_events) says what is known of them and what it costs;
    /// [`Builder::stock_pool`] has the settings. The connections of OTLP exporters are left out.
    ///
    /// The layer has a filter of its own. A filter of the whole registry would silence the pools, so
    /// give the application's own filter to its own layer:
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use otel_conntrack::{Conntrack, Hooks};
    /// use tracing_subscriber::filter::LevelFilter;
    /// use tracing_subscriber::{Layer, layer::SubscriberExt};
    ///
    /// let hooks = Hooks::new().on_idle_conn_out(|event| println!("{}: {:?}", event.key, event.kind));
    /// let conntrack = Conntrack::builder().observer(hooks).build()?;
    /// let subscriber = tracing_subscriber::registry()
    ///     .with(conntrack.stock_pool_layer()?)
    ///     .with(tracing_subscriber::fmt::layer().with_filter(LevelFilter::INFO));
    /// # let _guard = tracing::subscriber::set_default(subscriber);
    /// // ... and now any `reqwest::Client` ...
    /// assert!(conntrack.stats().pool("stock").is_some());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When there is one already, of this `Conntrack` or a clone of it, that was not dropped: two would
    /// count everything twice.
    #[cfg(feature = "stock")]
    pub fn stock_pool_layer<S>(
        &self,
    ) -> Result<crate::stock::pool_events::PoolEventsLayer<S>, ConfigError>
    where
        S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    {
        let new = || crate::stock::pool::StockPool::new(&self.recorder, &self.stock.config);
        self.stock.pool.get_or_init(new).layer().ok_or_else(|| {
            ConfigError::new(
                "stock_pool_layer",
                "called again",
                "one layer of this `Conntrack` lives already (`init()` may have installed it); a second \
                 one would count everything twice",
            )
        })
    }

    /// Everything that unmodified reqwest clients say in `tracing` events, as one layer for a subscriber
    /// of your own: [`stock_pool_layer`](Self::stock_pool_layer) and
    /// [`ConnectEvents`](crate::stock::ConnectEvents).
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use otel_conntrack::Conntrack;
    /// use tracing_subscriber::filter::LevelFilter;
    /// use tracing_subscriber::{Layer, layer::SubscriberExt};
    ///
    /// let conntrack = Conntrack::builder().build()?;
    /// let subscriber = tracing_subscriber::registry()
    ///     .with(conntrack.stock_layer()?)
    ///     .with(tracing_subscriber::fmt::layer().with_filter(LevelFilter::INFO));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`stock_pool_layer`](Self::stock_pool_layer).
    #[cfg(feature = "reqwest")]
    pub fn stock_layer<S>(&self) -> Result<impl tracing_subscriber::Layer<S> + use<S>, ConfigError>
    where
        S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    {
        use tracing_subscriber::Layer as _;
        let pool = self.stock_pool_layer()?;
        Ok(pool.and_then(crate::stock::ConnectEvents::layer()))
    }

    /// What listens to the pools of stock clients; none if nobody asked for its layer.
    #[cfg(feature = "stock")]
    #[allow(dead_code)] // by features
    pub(crate) fn stock_pool(&self) -> Option<&Arc<crate::stock::pool::StockPool>> {
        self.stock.pool.get()
    }

    /// A limit on the requests in flight to one host, under this name, for clients that have none:
    /// reqwest, hyper-util's. Give it a name that no transport and no other limit has, such as
    /// `search-limit`: metrics are summed by name.
    #[cfg(all(feature = "stock", feature = "hyper"))]
    pub fn in_flight_limit(&self, name: &str) -> crate::InFlightLimitBuilder {
        crate::InFlightLimitBuilder::new(self.recorder.clone(), name)
    }

    /// Has a dialer's name reported with zeros before its first use, for names that come with calls
    /// (`DialName`). go-conntrack: `PreRegisterDialerMetrics`.
    ///
    /// # Errors
    ///
    /// When the name is empty, longer than 100 bytes or has control characters.
    pub fn declare_dialer(&self, name: &str) -> Result<(), ConfigError> {
        valid_name("dialer name", name)?;
        self.recorder.declared(Direction::Outbound, name);
        Ok(())
    }

    /// Tracks a stream that somebody else accepted, from now until it is dropped.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use otel_conntrack::Conntrack;
    ///
    /// let conntrack = Conntrack::builder().build()?;
    /// let (stream, _peer) = tokio::io::duplex(64);
    /// let stream = conntrack.track_accepted("pipe", stream, None, None)?;
    /// assert_eq!(conntrack.connections().len(), 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When the name is empty, longer than 100 bytes or has control characters.
    pub fn track_accepted<T>(
        &self,
        name: &str,
        io: T,
        local: Option<Endpoint>,
        peer: Option<Endpoint>,
    ) -> Result<TrackedIo<T>, ConfigError> {
        valid_name("listener name", name)?;
        let scope = self.recorder.declared(Direction::Inbound, name);
        Ok(TrackedIo::new(
            io,
            self.recorder.accepted(&scope, local, peer, None),
        ))
    }

    /// Tracks somebody else's dialling: any future that yields a stream. Dropped before it is done,
    /// it counts as cancelled.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use otel_conntrack::{Conntrack, FailureReason};
    /// use std::io;
    ///
    /// let conntrack = Conntrack::builder().build()?;
    /// let dial = async { Err::<tokio::io::DuplexStream, _>(io::Error::from(io::ErrorKind::TimedOut)) };
    /// let failed = conntrack.track_dial("db", ("db.internal", 5432), dial).await;
    /// assert!(failed.is_err());
    ///
    /// let stats = conntrack.stats();
    /// let db = stats.dialer("db").ok_or("not there")?;
    /// assert_eq!((db.attempts, db.failed(FailureReason::TimedOut)), (1, 1));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// A name that can't be one, or the future's own.
    pub async fn track_dial<T, E>(
        &self,
        name: &str,
        target: impl Into<Target>,
        dial: impl Future<Output = Result<T, E>>,
    ) -> Result<TrackedIo<T>, TrackError<E>>
    where
        T: Endpoints,
        E: std::error::Error + 'static,
    {
        valid_name("dialer name", name)?;
        let scope = self.recorder.declared(Direction::Outbound, name);
        let (recorder, scope) =
            scope_of_exporter().unwrap_or_else(|| (self.recorder.clone(), scope));
        track(&recorder, &scope, target.into(), dial)
            .await
            .map_err(TrackError::Dial)
    }

    /// Everything that is counted, now.
    ///
    /// Each scope in it is consistent in itself: see [`ScopeStats`](crate::ScopeStats) for what is
    /// always true.
    pub fn stats(&self) -> Stats {
        self.recorder.stats()
    }

    /// Where the live page is served, if [`Builder::inspect`] was given an address: with port 0, the one
    /// that was free.
    #[cfg(feature = "inspect")]
    pub fn inspect_addr(&self) -> Option<std::net::SocketAddr> {
        self.page.as_ref().map(|page| page.address())
    }

    /// Every connection that is open or being set up, by id.
    pub fn connections(&self) -> Vec<ConnectionSnapshot> {
        self.recorder.look();
        self.recorder
            .live()
            .iter()
            .map(|connection| connection.snapshot())
            .filter(ConnectionSnapshot::is_there)
            .collect()
    }

    /// A page of [`connections`](Self::connections): at most `limit` of them, by id, those after `after`
    /// if it is given. The last one's id is the next page's `after`; an empty page is the end.
    ///
    /// With many connections this is the way to look at all of them: no page holds anything up for longer
    /// than it takes to look through a thirty-second of the ids. Pages are of different moments, so what
    /// was closed in between is missing.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let conntrack = otel_conntrack::Conntrack::builder().build()?;
    /// let mut after = None;
    /// loop {
    ///     let page = conntrack.connections_after(after, 100);
    ///     let Some(last) = page.last() else { break };
    ///     after = Some(last.id);
    ///     for connection in page {
    ///         println!("{} {} {}", connection.id, connection.name, connection.state);
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn connections_after(
        &self,
        after: Option<ConnectionId>,
        limit: usize,
    ) -> Vec<ConnectionSnapshot> {
        self.recorder.look();
        let (mut page, mut after) = (Vec::new(), after);
        // What was closed since it was found leaves room for others.
        while page.len() < limit {
            let (found, last) = self.recorder.live_after(after, limit - page.len());
            let Some(last) = last else { break };
            after = Some(last);
            let snapshots = found.iter().map(|connection| connection.snapshot());
            page.extend(snapshots.filter(ConnectionSnapshot::is_there));
        }
        page
    }

    /// The last connections that were closed and attempts that failed, oldest first; as many as
    /// [`Builder::history`] keeps.
    pub fn recently_closed(&self) -> Vec<ConnectionSnapshot> {
        self.recorder.history()
    }
}

impl std::fmt::Debug for Conntrack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conntrack")
            .field("recorder", &self.recorder)
            .finish_non_exhaustive()
    }
}

/// Why [`Conntrack::track_dial`] gave no stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError<E: std::error::Error + 'static> {
    /// The name can't be one; nothing was dialled.
    #[error(transparent)]
    Name(#[from] ConfigError),
    /// The dialling failed.
    #[error(transparent)]
    Dial(E),
}
