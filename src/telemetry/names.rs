//! Every name that leaves this crate: spans, span events, metrics, attributes. One table.
//!
//! The names follow OpenTelemetry's semantic conventions where they have one, in the version of
//! [`SCHEMA_URL`]; the rest is under `conntrack.`. The conventions are still moving, so no other
//! file spells a name, and the README's reference is rendered from here (a test compares them).

/// The instrumentation scope's name.
pub const SCOPE: &str = "otel-conntrack";
/// The semantic conventions that the names are taken from.
pub const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.44.0";

/// Declares attributes: a constant for the key, and the table of all with what they mean.
macro_rules! attributes {
    ($( $constant:ident = $key:literal: $meaning:literal; )+) => {
        $( #[doc = $meaning] pub const $constant: &str = $key; )+

        /// Every attribute: key and meaning.
        pub const ATTRIBUTES: &[(&str, &str)] = &[$( ($key, $meaning), )+];
    };
}

attributes! {
    CLOSE_REASON = "conntrack.close.reason": "why the connection ended: the first reason seen";
    CLOSE_INITIATOR = "conntrack.close.initiator": "who ended it: `local` or `remote`; `unknown` where nothing told";
    CLOSE_WITH_ACTIVE = "conntrack.close.with_active_requests": "requests were running when it ended";
    CONNECTION_ID = "conntrack.connection.id": "the connection, on its own spans and on its requests' spans: the way back from one to the other";
    CONNECTION_OPEN = "conntrack.connection.open": "it was still open when this span was written (checkpoint, shutdown)";
    CONNECTION_REQUESTS = "conntrack.connection.requests": "requests seen on it so far";
    CONNECTION_IN_FLIGHT = "conntrack.connection.in_flight": "requests running on it";
    CONNECTION_REUSED = "conntrack.connection.reused": "the connection had served a request before";
    CONNECTION_IDLE_TIME = "conntrack.connection.idle_time": "how long it had been idle, seconds";
    BYTES_READ = "conntrack.connection.bytes_read": "bytes read from it, on the layer that was wrapped";
    BYTES_WRITTEN = "conntrack.connection.bytes_written": "bytes written to it, on the layer that was wrapped";
    TIMELINE_DROPPED = "conntrack.timeline.dropped": "moments between the first and the last that were not kept";
    DIRECTION = "conntrack.direction": "`inbound` (accepted) or `outbound` (opened)";
    NAME = "conntrack.name": "the name of the listener, dialer, connector, transport or in-flight limit; `stock` for the pools of stock clients. What has the same name is summed in `conntrack.pool.*`: give a limit a name of its own";
    INSTANCE = "conntrack.instance": "which `Conntrack` of the process, from 0; on the instrumentation scope";
    DROPPED_ITEM = "conntrack.dropped.item": "what was dropped: `span`, `metric_export`, `event`, `channel`, `label_set`, `name`, `phase`, `observer_panic`, `sink_panic`, `pool_event`, `pool_message`; of the host's table `malformed_row`, `untracked`";
    REASON = "conntrack.reason": "why: a close, accept or reject reason; of a pool event the wait's outcome, the close reason, `reused` or `new`";
    POOL_EVENT = "conntrack.event": "what happened in the pool, such as `IdleConnIn`";
    POOL_LIMIT = "conntrack.limit": "which limit: `max_conns_per_host`, `max_idle_conns`, `max_idle_conns_per_host` (connections), `max_waiters` and, of an in-flight limit, `max_in_flight_per_host` (requests)";
    POOL_LIMIT_VALUE = "conntrack.limit.value": "what the limit is";
    POOL_ACTIVE = "conntrack.pool.active": "connections of the host that requests had";
    POOL_IDLE = "conntrack.pool.idle": "connections that no request had: the host's, or for `max_idle_conns` all";
    POOL_DIALING = "conntrack.pool.dialing": "dials to the host that were under way";
    POOL_IN_FLIGHT = "conntrack.pool.in_flight": "requests that held the places of an in-flight limit for the host; it knows no connections";
    POOL_WAITING = "conntrack.pool.waiting": "requests that waited for a connection to the host, this one included";
    WAIT_OUTCOME = "conntrack.wait.outcome": "how the wait ended: `delivered_idle`, `delivered_new`, `shared_h2`, `timed_out`, `cancelled`, `dial_failed`, `pool_closed`; `slot_freed` for the queue for a slot alone; `own_dial_or_cancelled` for stock pools alone";
    WAIT_REASON = "conntrack.wait.reason": "why it waited: `no_idle_connection`, `shared_dial`, `max_conns_per_host`";
    WAIT_DEPTH = "conntrack.wait.queue_depth": "how many requests to the host waited when this one began to, itself included";
    LINK_KIND = "conntrack.link": "on a link of a wait: `setup` (what it waited for) or `holder` (a request that held a connection)";
    SOURCE = "conntrack.source": "how a gauge of a stock pool is known: `observed`, `assumed` (HTTP/1, not proved yet), `upper_bound` or `approximate`; not set where the pool counts itself";
    IO_LAYER = "conntrack.io.layer": "`wire` (ciphertext if TLS runs above) or `plaintext`";
    IO_DIRECTION = "conntrack.io.direction": "`read` or `written`, as seen from this process";
    ERROR_TYPE = "error.type": "why it failed; never set on success";
    SERVER_ADDRESS = "server.address": "the host asked for; `_other` for hosts beyond the bound";
    SERVER_PORT = "server.port": "the port asked for";
    URL_SCHEME = "url.scheme": "`http` or `https`, where an HTTP client asked";
    HOST_PORT = "conntrack.host.port": "of the host's connections: the local port of inbound ones, the remote port of outbound ones; `_other` beyond the bound";
    HOST_GROUP = "conntrack.host.group": "the peer's subnet or the socket's cgroup, where asked for; `_other` beyond the bound, `unknown` where the kernel told none";
    HOST_AGE = "le": "at most so old, seconds, as in a histogram of Prometheus: each bound counts those below it too";
    HOST_SCAN_RESULT = "conntrack.host.scan.result": "`whole`, `torn` (something may have been left out) or `failed`";
    CONNECTION_STATE = "network.connection.state": "the kernel's state of a TCP connection: `established`, `close_wait`, `time_wait`, ...; on spans at that time, like all of `conntrack.tcp` (Linux)";
    HTTP_CONNECTION_STATE = "http.connection.state": "`active` or `idle`; of a listener's connections also `new` and `hijacked`";
    PROTOCOL_VERSION = "network.protocol.version": "`1.0`, `1.1` or `2`, once it is known";
    NETWORK_TRANSPORT = "network.transport": "`tcp` or `unix`";
    NETWORK_TYPE = "network.type": "`ipv4` or `ipv6`";
    PEER_ADDRESS = "network.peer.address": "their address, on spans only";
    PEER_PORT = "network.peer.port": "their port, on spans only";
    LOCAL_ADDRESS = "network.local.address": "our address, on spans only";
    LOCAL_PORT = "network.local.port": "our port, on spans only";
    DNS_QUESTION = "dns.question.name": "the name that was looked up";
    DNS_ANSWERS = "dns.answers": "the addresses found, at most 16";
    TCP_RTT = "conntrack.tcp.rtt": "smoothed round-trip time, seconds; not set while nothing was measured";
    TCP_RTT_VARIANCE = "conntrack.tcp.rtt_variance": "how much the round-trip time varies, seconds; likewise";
    TCP_RETRANSMITS = "conntrack.tcp.retransmits": "segments sent again, of the whole connection so far";
    TCP_LOST = "conntrack.tcp.lost": "segments under way that the kernel took for lost at that time";
    TCP_CONGESTION_WINDOW = "conntrack.tcp.congestion_window": "how many segments might be under way";
    TCP_DELIVERY_RATE = "conntrack.tcp.delivery_rate": "the newest measure of how fast data reached the peer, bytes per second";
    TCP_APP_LIMITED = "conntrack.tcp.app_limited": "that measure is of a time when there was too little to send: it says how much was asked of the way, which may be faster; set with `conntrack.tcp.delivery_rate`, on spans and on the metric";
    TCP_BYTES_ACKED = "conntrack.tcp.bytes_acked": "bytes that the peer has acknowledged, of the whole connection so far";
    TCP_NOT_SENT = "conntrack.tcp.not_sent": "bytes that were written and waited to be sent";
    TLS_VERSION = "tls.protocol.version": "`1.2` or `1.3`";
    TLS_CIPHER = "tls.cipher": "the cipher suite";
    TLS_NEXT_PROTOCOL = "tls.next_protocol": "ALPN";
    TLS_RESUMED = "tls.resumed": "an earlier session was resumed";
}

/// A span or span event.
#[derive(Clone, Copy, Debug)]
pub struct SpanName {
    /// The name; what stands in braces is filled in.
    pub name: &'static str,
    /// When it is written and where it hangs.
    pub meaning: &'static str,
    /// The attributes that it can have.
    pub attributes: &'static [&'static str],
}

/// Every span.
pub const SPANS: &[SpanName] = &[
    SpanName {
        name: "connection_setup {server.address}:{server.port}",
        meaning: "outbound set-up; root of the connection's trace, written when the connection is usable or has failed; requests link to it",
        attributes: &[
            CONNECTION_ID,
            NAME,
            DIRECTION,
            SERVER_ADDRESS,
            SERVER_PORT,
            URL_SCHEME,
            NETWORK_TRANSPORT,
            NETWORK_TYPE,
            PEER_ADDRESS,
            PEER_PORT,
            LOCAL_ADDRESS,
            LOCAL_PORT,
            TLS_VERSION,
            TLS_CIPHER,
            TLS_NEXT_PROTOCOL,
            TLS_RESUMED,
            ERROR_TYPE,
        ],
    },
    SpanName {
        name: "connection_setup {conntrack.name}",
        meaning: "inbound set-up: the accept, and the TLS handshake where this crate makes it; root of the connection's trace",
        attributes: &[
            CONNECTION_ID,
            NAME,
            DIRECTION,
            NETWORK_TRANSPORT,
            NETWORK_TYPE,
            PEER_ADDRESS,
            PEER_PORT,
            LOCAL_ADDRESS,
            LOCAL_PORT,
            TLS_VERSION,
            TLS_CIPHER,
            TLS_NEXT_PROTOCOL,
            TLS_RESUMED,
            ERROR_TYPE,
        ],
    },
    SpanName {
        name: "dns lookup {dns.question.name}",
        meaning: "child of the set-up",
        attributes: &[DNS_QUESTION, DNS_ANSWERS, ERROR_TYPE],
    },
    SpanName {
        name: "tcp connect {network.peer.address}:{network.peer.port}",
        meaning: "child of the set-up, one per address tried",
        attributes: &[
            PEER_ADDRESS,
            PEER_PORT,
            NETWORK_TRANSPORT,
            NETWORK_TYPE,
            ERROR_TYPE,
        ],
    },
    SpanName {
        name: "tls handshake {server.address}",
        meaning: "child of the set-up; `tls handshake` where a client named no server",
        attributes: &[
            SERVER_ADDRESS,
            TLS_VERSION,
            TLS_CIPHER,
            TLS_NEXT_PROTOCOL,
            TLS_RESUMED,
            ERROR_TYPE,
        ],
    },
    SpanName {
        name: "connection {server.address}:{server.port}",
        meaning: "child of the set-up: the whole life, written at the close (or at shutdown, for what is still open); its events are the timeline. Inbound: `connection {conntrack.name}`",
        attributes: &[
            CONNECTION_ID,
            NAME,
            DIRECTION,
            SERVER_ADDRESS,
            SERVER_PORT,
            URL_SCHEME,
            NETWORK_TRANSPORT,
            NETWORK_TYPE,
            PEER_ADDRESS,
            PEER_PORT,
            LOCAL_ADDRESS,
            LOCAL_PORT,
            PROTOCOL_VERSION,
            CONNECTION_REQUESTS,
            CONNECTION_IN_FLIGHT,
            BYTES_READ,
            BYTES_WRITTEN,
            CLOSE_REASON,
            CLOSE_INITIATOR,
            CLOSE_WITH_ACTIVE,
            CONNECTION_IDLE_TIME,
            CONNECTION_OPEN,
            TIMELINE_DROPPED,
            CONNECTION_STATE,
            TCP_RTT,
            TCP_RTT_VARIANCE,
            TCP_RETRANSMITS,
            TCP_LOST,
            TCP_CONGESTION_WINDOW,
            TCP_DELIVERY_RATE,
            TCP_APP_LIMITED,
            TCP_BYTES_ACKED,
            TCP_NOT_SENT,
        ],
    },
    SpanName {
        name: "wait_for_connection {server.address}:{server.port}",
        meaning: "child of the *caller's* span, when a request had to wait for a connection; links to the set-up that it waited for, also a failed one, and after a limit hit to up to 8 requests that held the connections, sampled ones first",
        attributes: &[
            NAME,
            SERVER_ADDRESS,
            SERVER_PORT,
            URL_SCHEME,
            WAIT_OUTCOME,
            WAIT_REASON,
            WAIT_DEPTH,
            LINK_KIND,
            ERROR_TYPE,
        ],
    },
    SpanName {
        name: CHECKPOINT,
        meaning: "child of the set-up, for a connection that is open for longer than the checkpoint interval: the totals so far",
        attributes: &[
            CONNECTION_ID,
            NAME,
            DIRECTION,
            SERVER_ADDRESS,
            SERVER_PORT,
            URL_SCHEME,
            PROTOCOL_VERSION,
            CONNECTION_REQUESTS,
            CONNECTION_IN_FLIGHT,
            BYTES_READ,
            BYTES_WRITTEN,
            CONNECTION_OPEN,
            CONNECTION_IDLE_TIME,
            CONNECTION_STATE,
            TCP_RTT,
            TCP_RTT_VARIANCE,
            TCP_RETRANSMITS,
            TCP_LOST,
            TCP_CONGESTION_WINDOW,
            TCP_DELIVERY_RATE,
            TCP_APP_LIMITED,
            TCP_BYTES_ACKED,
            TCP_NOT_SENT,
        ],
    },
];

/// The span of a connection that is still open.
pub const CHECKPOINT: &str = "connection checkpoint";
/// The event on the caller's span when its request has a connection.
pub const ACQUIRED: &str = "connection.acquired";

/// The event on the span of a wait that a limit was the reason for.
pub const MAX_CONNS_PER_HOST_HIT: &str = "MaxConnsPerHostHit";

/// Every span event.
pub const EVENTS: &[SpanName] = &[
    SpanName {
        name: ACQUIRED,
        meaning: "on the *caller's* span, when the request has its connection, with a link to the connection's set-up if that is sampled",
        attributes: &[CONNECTION_ID, CONNECTION_REUSED, CONNECTION_IDLE_TIME],
    },
    SpanName {
        name: "open, new, active, idle, hijacked, end_of_stream, local_shutdown, io_error",
        meaning: "on the `connection` span: its timeline, the first 24 and the last 24 moments",
        attributes: &[],
    },
    SpanName {
        name: "MaxIdleConnsHit, MaxIdleConnsPerHostHit",
        meaning: "on the `connection` span of the connection that is closed for it",
        attributes: &[POOL_LIMIT_VALUE, POOL_IDLE],
    },
    SpanName {
        name: MAX_CONNS_PER_HOST_HIT,
        meaning: "on the `wait_for_connection` span of the request that found no slot",
        attributes: &[
            POOL_LIMIT_VALUE,
            POOL_ACTIVE,
            POOL_IDLE,
            POOL_DIALING,
            POOL_IN_FLIGHT,
            POOL_WAITING,
        ],
    },
];

/// How a metric is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Instrument {
    /// Observable counter: only grows.
    Counter,
    /// Observable up-down counter: a gauge that may be summed.
    UpDownCounter,
    /// Observable gauge of whole numbers: not to be summed.
    Gauge,
    /// Observable gauge of seconds.
    Seconds,
    /// Histogram with the given bounds.
    Histogram(&'static [f64]),
}

impl Instrument {
    /// As it is called in the reference.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "observable counter",
            Self::UpDownCounter => "observable up-down counter",
            Self::Gauge | Self::Seconds => "observable gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// The name.
    pub name: &'static str,
    /// How it is made.
    pub instrument: Instrument,
    /// The unit, UCUM.
    pub unit: &'static str,
    /// What it tells.
    pub description: &'static str,
    /// The attributes that it can have.
    pub attributes: &'static [&'static str],
}

/// Bounds for what takes milliseconds, seconds; as in the conventions for request durations.
pub const SHORT: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
/// Bounds for how long connections live, seconds; as in the conventions.
pub const LONG: &[f64] = &[
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
];
/// Bounds for set-up phases and round trips, which take microseconds on one host and seconds over a bad network.
pub const SETUP: &[f64] = &[
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
/// Bounds for requests per connection.
pub const REQUESTS: &[f64] = &[
    0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 10_000.0,
];

/// Bounds for segments; the kernel begins with a window of ten.
pub const SEGMENTS: &[f64] = &[
    0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 10_000.0,
];
/// Bounds for bytes that wait: from none over 1 KiB in steps of four to 64 MiB.
pub const BYTES: &[f64] = &[
    0.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];
/// Bounds for bytes per second: from a bad modem to ten gigabytes, close where networks are.
pub const RATES: &[f64] = &[
    1e3, 1e4, 1e5, 2.5e5, 5e5, 1e6, 2.5e6, 5e6, 1e7, 2.5e7, 5e7, 1e8, 1e9, 1e10,
];

/// Declares metrics: a constant for each, and the table of all.
macro_rules! metrics {
    ($( #[$meta:meta] )+ $table:ident: $( $constant:ident = $name:literal, $instrument:expr, $unit:literal, $description:literal, $attributes:expr; )+) => {
        $( #[doc = $description] pub const $constant: Metric = Metric {
            name: $name,
            instrument: $instrument,
            unit: $unit,
            description: $description,
            attributes: $attributes,
        }; )+

        $( #[$meta] )+
        pub const $table: &[Metric] = &[$( $constant, )+];
    };
}

use Instrument::{Counter, Gauge, Histogram, Seconds, UpDownCounter};

metrics! {
    /// Every metric.
    METRICS:
    OPEN_CONNECTIONS = "http.client.open_connections", UpDownCounter, "{connection}",
        "Outbound HTTP connections that are open and whose requests are seen, by what they do.",
        &[HTTP_CONNECTION_STATE, SERVER_ADDRESS, SERVER_PORT, URL_SCHEME, PROTOCOL_VERSION];
    CONNECTION_DURATION = "http.client.connection.duration", Histogram(LONG), "s",
        "How long outbound HTTP connections were open; recorded at the close.",
        &[SERVER_ADDRESS, SERVER_PORT, URL_SCHEME, PROTOCOL_VERSION];
    ACTIVE_REQUESTS = "http.client.active_requests", UpDownCounter, "{request}",
        "Requests of transports, and under in-flight limits, that wait for a connection or have one. Each transport and each limit counts its own: a request under a limit over a transport, or under two limits, is in it twice, unless all but one are built with `metrics(false)`.",
        &[SERVER_ADDRESS, SERVER_PORT, URL_SCHEME];
    TIME_IN_QUEUE = "http.client.request.time_in_queue", Histogram(SHORT), "s",
        "How long requests of transports, and under in-flight limits, waited for a connection; only those that waited.",
        &[SERVER_ADDRESS, SERVER_PORT, URL_SCHEME, WAIT_OUTCOME];
    CONNECTIONS = "conntrack.connections", UpDownCounter, "{connection}",
        "Connections that are open.",
        &[DIRECTION, NAME];
    DURATION = "conntrack.connection.duration", Histogram(LONG), "s",
        "How long connections were open; recorded at the close.",
        &[DIRECTION, NAME, REASON];
    DIALER_ATTEMPTS = "conntrack.dialer.attempts", Counter, "{attempt}",
        "Outbound connections that were asked for.",
        &[NAME];
    DIALER_ESTABLISHED = "conntrack.dialer.established", Counter, "{connection}",
        "Outbound connections that came about.",
        &[NAME];
    DIALER_FAILED = "conntrack.dialer.failed", Counter, "{attempt}",
        "Outbound connections that failed, each with exactly one reason.",
        &[NAME, ERROR_TYPE];
    DIALER_CLOSED = "conntrack.dialer.closed", Counter, "{connection}",
        "Outbound connections that were closed.",
        &[NAME, REASON];
    SETUP_DURATION = "conntrack.connection.setup.duration", Histogram(SETUP), "s",
        "How long it took until an outbound connection was usable, or had failed.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT, ERROR_TYPE];
    DNS_DURATION = "dns.lookup.duration", Histogram(SETUP), "s",
        "How long name look-ups took.",
        &[DNS_QUESTION, ERROR_TYPE];
    TCP_DURATION = "conntrack.tcp.connect.duration", Histogram(SETUP), "s",
        "How long connecting to one address took.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT, ERROR_TYPE];
    TLS_DURATION = "conntrack.tls.handshake.duration", Histogram(SETUP), "s",
        "How long TLS handshakes took.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT, ERROR_TYPE];
    IDLE_TIME = "conntrack.connection.idle_time", Histogram(LONG), "s",
        "How long connections had been idle that were closed while idle.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT, REASON];
    CONNECTION_REQUEST_COUNT = "conntrack.connection.requests", Histogram(REQUESTS), "{request}",
        "Requests per connection, for those whose requests are seen; recorded at the close.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT];
    IO = "conntrack.connection.io", Counter, "By",
        "Bytes read and written.",
        &[NAME, DIRECTION, SERVER_ADDRESS, SERVER_PORT, IO_DIRECTION, IO_LAYER];
    TCP_ROUND_TRIP = "conntrack.tcp.rtt", Histogram(SETUP), "s",
        "The kernel's smoothed round-trip time of connections: of each that is open once per `tcp_sample_interval`, and at its close; TCP on Linux.",
        &[NAME, DIRECTION, SERVER_ADDRESS, SERVER_PORT];
    TCP_ROUND_TRIP_VARIANCE = "conntrack.tcp.rtt_variance", Histogram(SETUP), "s",
        "How much the round-trip time of open connections varies; of each once per `tcp_sample_interval`, not at its close; TCP on Linux.",
        &[NAME, DIRECTION, SERVER_ADDRESS, SERVER_PORT];
    TCP_WINDOW = "conntrack.tcp.congestion_window", Histogram(SEGMENTS), "{segment}",
        "How many segments may be under way on open connections; of each once per `tcp_sample_interval`, not at its close; TCP on Linux.",
        &[NAME, DIRECTION, SERVER_ADDRESS, SERVER_PORT];
    TCP_RATE = "conntrack.tcp.delivery_rate", Histogram(RATES), "By/s",
        "How fast data reached the peers of open connections when the kernel measured it last; of each once per `tcp_sample_interval`, not at its close, and only where it was measured; TCP on Linux 4.9.",
        &[NAME, DIRECTION, SERVER_ADDRESS, SERVER_PORT, TCP_APP_LIMITED];
    TCP_UNSENT = "conntrack.tcp.not_sent", Histogram(BYTES), "By",
        "Bytes that were written to open connections and wait to be sent, for the peer or for the network; of each once per `tcp_sample_interval`, not at its close; TCP on Linux 4.6.",
        &[NAME, DIRECTION, SERVER_ADDRESS, SERVER_PORT];
    TCP_LOST_NOW = "conntrack.tcp.lost", Histogram(SEGMENTS), "{segment}",
        "Segments under way on open connections that the kernel takes for lost; of each once per `tcp_sample_interval`, not at its close; TCP on Linux.",
        &[NAME, DIRECTION, SERVER_ADDRESS, SERVER_PORT];
    TCP_SENT_AGAIN = "conntrack.tcp.retransmits", Counter, "{segment}",
        "Segments that were sent again; of each open connection as of its last sample, of each closed one all; TCP on Linux.",
        &[NAME, DIRECTION, SERVER_ADDRESS, SERVER_PORT];
    TCP_ACKED = "conntrack.tcp.bytes_acked", Counter, "By",
        "Bytes that peers have acknowledged; of each open connection as of its last sample, of each closed one all; TCP on Linux 4.1.",
        &[NAME, DIRECTION, SERVER_ADDRESS, SERVER_PORT];
    POOL_WAITING_NOW = "conntrack.pool.waiting", Gauge, "{request}",
        "Requests that wait for a connection, or under an in-flight limit for a place.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT, URL_SCHEME, SOURCE];
    POOL_WAITING_MAX = "conntrack.pool.waiting.max", Gauge, "{request}",
        "The most requests that waited at a time, in this minute or the one before.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT, URL_SCHEME, SOURCE];
    POOL_OLDEST_WAIT = "conntrack.pool.oldest_wait", Seconds, "s",
        "How long the first in the queue has waited; not of stock pools.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT, URL_SCHEME];
    POOL_IDLE_NOW = "conntrack.pool.idle", Gauge, "{connection}",
        "Idle connections in pools; not of in-flight limits, which have none. A stock pool's HTTP/2 connections (version `2`) are in its list while requests run on them too.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT, URL_SCHEME, PROTOCOL_VERSION, SOURCE];
    POOL_LIMITS = "conntrack.pool.limit", Gauge, "{item}",
        "What a pool or an in-flight limit is held to, in connections or requests; a limit that is not set is not there.",
        &[NAME, POOL_LIMIT];
    POOL_EVENTS = "conntrack.pool.events", Counter, "{event}",
        "What happened in pools: waits, reuse, idle connections coming and going, limits hit.",
        &[NAME, SERVER_ADDRESS, SERVER_PORT, URL_SCHEME, POOL_EVENT, REASON];
    LISTENER_ACCEPTED = "conntrack.listener.accepted", Counter, "{connection}",
        "Inbound connections that were accepted.",
        &[NAME];
    LISTENER_CLOSED = "conntrack.listener.closed", Counter, "{connection}",
        "Inbound connections that were closed.",
        &[NAME, REASON];
    LISTENER_ACCEPT_ERRORS = "conntrack.listener.accept_errors", Counter, "{error}",
        "Accepts that failed.",
        &[NAME, REASON];
    LISTENER_REJECTED = "conntrack.listener.rejected", Counter, "{connection}",
        "Inbound connections that were turned away.",
        &[NAME, REASON];
    LISTENER_LIMIT_HITS = "conntrack.listener.limit_hits", Counter, "{hit}",
        "How often `max_connections` was reached: once for each wait for a place, once for each connection that was turned away.",
        &[NAME];
    LISTENER_CONNECTIONS = "conntrack.listener.connections", UpDownCounter, "{connection}",
        "Inbound connections that are open and whose requests are seen, by what they do; `new` and `hijacked` where a server of HTTP is on them. All that are open are in `conntrack.connections`.",
        &[NAME, HTTP_CONNECTION_STATE];
    LISTENER_NEW_OLDEST = "conntrack.listener.new.oldest", Seconds, "s",
        "The age of the oldest inbound connection from which no request came yet; where a server of HTTP is on them.",
        &[NAME];
    LISTENER_HANDSHAKES = "conntrack.listener.tls.handshakes", UpDownCounter, "{handshake}",
        "TLS handshakes of inbound connections that are under way; where this crate makes them.",
        &[NAME];
    LISTENER_QUEUE_LENGTH = "conntrack.listener.accept_queue.length", Gauge, "{connection}",
        "Connections that wait in the kernel to be accepted; TCP on Linux.",
        &[NAME];
    LISTENER_QUEUE_LIMIT = "conntrack.listener.accept_queue.limit", Gauge, "{connection}",
        "How many connections may wait in the kernel to be accepted; TCP on Linux.",
        &[NAME];
    LISTENER_FIRST_BYTE = "conntrack.listener.first_byte.duration", Histogram(SHORT), "s",
        "From the accept of a connection to the first bytes read from it, of whatever is spoken on it.",
        &[NAME];
    DROPPED = "conntrack.dropped", Counter, "{item}",
        "What this crate had to drop, so that it stays within its bounds.",
        &[DROPPED_ITEM];
}

metrics! {
    /// Every metric of the host's table (feature `host`): `Monitor::observe` and `conntrack-exporter`.
    HOST_METRICS:
    HOST_SOCKETS = "system.network.connection.count", UpDownCounter, "{connection}",
        "TCP sockets of the host, by state; of the ports that are looked at.",
        &[CONNECTION_STATE, NETWORK_TRANSPORT, NETWORK_TYPE];
    HOST_CONNECTIONS = "conntrack.host.connections", UpDownCounter, "{connection}",
        "The host's established connections.",
        &[DIRECTION, HOST_PORT, NETWORK_TYPE, HOST_GROUP];
    HOST_LONGTERM = "conntrack.host.longterm_connections", UpDownCounter, "{connection}",
        "Those that are established for at least `duration`.",
        &[DIRECTION, HOST_PORT, NETWORK_TYPE, HOST_GROUP];
    HOST_AGES = "conntrack.host.connection.age", UpDownCounter, "{connection}",
        "The host's established connections that are at most so old. Prometheus has it as the histogram `conntrack_host_connection_age_seconds` of what is open now: it goes up and down, so it is to be read without `rate`.",
        &[DIRECTION, NETWORK_TYPE, HOST_AGE];
    HOST_QUEUE_LENGTH = "conntrack.host.accept_queue.length", Gauge, "{connection}",
        "Connections that wait in the kernel to be accepted, by listening port.",
        &[HOST_PORT];
    HOST_QUEUE_LIMIT = "conntrack.host.accept_queue.limit", Gauge, "{connection}",
        "How many may wait, by listening port; not where `/proc` is read.",
        &[HOST_PORT];
    HOST_SEGMENTS = "conntrack.host.tcp.segments_sent", Counter, "{segment}",
        "TCP segments that the host sent, less those sent again.",
        &[];
    HOST_RETRANSMITS = "conntrack.host.tcp.retransmits", Counter, "{segment}",
        "TCP segments that the host sent again.",
        &[];
    HOST_OVERFLOWS = "conntrack.host.listen.overflows", Counter, "{connection}",
        "How often an accept queue was full.",
        &[];
    HOST_DROPS = "conntrack.host.listen.drops", Counter, "{connection}",
        "Connections that were turned away at a listening socket, for whatever reason.",
        &[];
    HOST_SCANS = "conntrack.host.scans", Counter, "{scan}",
        "How often the table was read, and how it went.",
        &[HOST_SCAN_RESULT];
    HOST_SCAN_DURATION = "conntrack.host.scan.duration", Seconds, "s",
        "How long reading the table took the last time.",
        &[];
    HOST_SCAN_AGE = "conntrack.host.scan.age", Seconds, "s",
        "How old what is told here is: the time since the last scan that did not fail.",
        &[];
    HOST_DROPPED = "conntrack.host.dropped", Counter, "{row}",
        "Rows of the table that could not be read (`malformed_row`), and how often a connection was seen for which there was no room (`untracked`).",
        &[DROPPED_ITEM];
}

/// The reference of spans, events, metrics and attributes, in Markdown: the README's section.
pub fn reference() -> String {
    use std::fmt::Write as _;

    fn code(names: &[&str]) -> String {
        names
            .iter()
            .map(|name| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(", ")
    }

    let mut out =
        String::from("#### Spans\n\n| span | when and where | attributes |\n|---|---|---|\n");
    // Writing to a `String` can't fail.
    for span in SPANS.iter().chain(EVENTS) {
        let _ = writeln!(
            out,
            "| `{}` | {} | {} |",
            span.name,
            span.meaning,
            code(span.attributes)
        );
    }
    out.push_str("\n#### Metrics\n\n| metric | instrument, unit | what it tells | attributes |\n|---|---|---|---|\n");
    for metric in METRICS.iter().chain(HOST_METRICS) {
        let _ = writeln!(
            out,
            "| `{}` | {}, `{}` | {} | {} |",
            metric.name,
            metric.instrument.as_str(),
            metric.unit,
            metric.description,
            code(metric.attributes)
        );
    }
    out.push_str("\n#### Attributes\n\n| attribute | meaning |\n|---|---|\n");
    for (key, meaning) in ATTRIBUTES {
        let _ = writeln!(out, "| `{key}` | {meaning} |");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_attributes_are_all_declared() {
        let metrics = || METRICS.iter().chain(HOST_METRICS);
        let names: BTreeSet<_> = metrics().map(|metric| metric.name).collect();
        assert_eq!(names.len(), metrics().count());
        let keys: BTreeSet<_> = ATTRIBUTES.iter().map(|(key, _)| *key).collect();
        assert_eq!(keys.len(), ATTRIBUTES.len());
        let used = metrics().flat_map(|metric| metric.attributes);
        let used = used.chain(SPANS.iter().chain(EVENTS).flat_map(|span| span.attributes));
        for key in used {
            assert!(
                keys.contains(key),
                "{key} is not in the table of attributes"
            );
        }
    }

    #[test]
    fn the_readme_has_this_reference() {
        let readme = include_str!("../../README.md");
        assert!(
            readme.contains(&reference()),
            "README.md's reference is out of date; put this there:\n\n{}",
            reference()
        );
    }
}
