//! What settings there are. A name is the flag's and the file's; the variable is the same in capitals
//! with `_`.

/// A setting that flags, environment and file know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spec {
    pub(super) name: &'static str,
    pub(super) default: &'static str,
    /// Whether it may stand alone, which means `true`.
    pub(super) alone: bool,
    /// What kind of value it takes, for help.
    pub(super) value: &'static str,
    pub(super) help: &'static str,
}

impl Spec {
    pub(super) fn variable(&self) -> String {
        self.name.to_uppercase().replace('-', "_")
    }
}

/// Every setting but the file's name, in the order in which they are shown.
pub(super) const SETTINGS: &[&Spec] = &[
    &SIMPLE,
    &TCPV6,
    &PORT,
    &LISTEN,
    &ALLOW_HOST,
    &DURATION,
    &PERIOD,
    &GROUP_BY,
    &ROWS,
    &LIMIT,
    &PROC_ROOT,
    &OTLP,
];

/// The file's name: its flag, its variable.
pub(super) const CONFIG: (&str, &str) = ("config", "CONFIG");

pub(super) const SIMPLE: Spec = Spec {
    name: "simple",
    default: "false",
    alone: true,
    value: "BOOL",
    help: "One gauge of all long-term connections, without labels, instead of one per port and IP version",
};

pub(super) const TCPV6: Spec = Spec {
    name: "tcpv6",
    default: "true",
    alone: true,
    value: "BOOL",
    help: "Look at IPv6 too. IPv4 clients of a server on [::] are IPv4 and always looked at",
};

pub(super) const PORT: Spec = Spec {
    name: "port",
    default: "-1",
    alone: false,
    value: "PORTS",
    help: "Local ports to look at: 443,8080-8090,https; -1 for all but the exporter's own. Given several times, they are added up",
};

pub(super) const LISTEN: Spec = Spec {
    name: "listen",
    default: "9690",
    alone: false,
    value: "PORT|ADDRESS",
    help: "Where to serve /metrics: a port, which is bound on 127.0.0.1 only, or an address such as 0.0.0.0:9690, or [::]:9690 with IPv6, for others to reach it; there is no access control",
};

pub(super) const ALLOW_HOST: Spec = Spec {
    name: "allow-host",
    default: "localhost",
    alone: false,
    value: "NAMES",
    help: "Names under which it may be asked, besides IP addresses and those that end in .localhost: exporter.internal,node1; others get 421. Without it, an address that others can reach answers under any name",
};

pub(super) const DURATION: Spec = Spec {
    name: "duration",
    default: "6",
    alone: false,
    value: "SECONDS",
    help: "How long a connection is established before it is long-term, in whole seconds of real time",
};

pub(super) const PERIOD: Spec = Spec {
    name: "period",
    default: "1",
    alone: false,
    value: "SECONDS",
    help: "How often the kernel's table is read, from 0.1 to 3600; at most a tenth of the time is spent reading",
};

pub(super) const GROUP_BY: Spec = Spec {
    name: "group-by",
    default: "none",
    alone: false,
    value: "GROUP",
    help: "A further label of conntrack_host_*: subnet/24 (bits of IPv4, 64 of IPv6), subnet/24/56 (of both), cgroup, none",
};

pub(super) const ROWS: Spec = Spec {
    name: "rows",
    default: "1000",
    alone: false,
    value: "COUNT",
    help: "Sets of labels that connections are counted by at most, from 1 to 1800; the rest is summed in `_other`",
};

pub(super) const LIMIT: Spec = Spec {
    name: "limit",
    default: "2000000",
    alone: false,
    value: "COUNT",
    help: "Connections that are tracked at most, from 1 to 100000000, some 60 bytes each where they are there; those beyond are counted in conntrack_host_dropped_total",
};

pub(super) const PROC_ROOT: Spec = Spec {
    name: "proc-root",
    default: "/proc",
    alone: false,
    value: "DIRECTORY",
    help: "Read the tables under another /proc, such as a host's that is mounted into this container: DIRECTORY/1/net, else DIRECTORY/net",
};

pub(super) const OTLP: Spec = Spec {
    name: "otlp",
    default: "auto",
    alone: true,
    value: "BOOL|URL",
    help: "Send metrics by OTLP too: true (where OTEL_EXPORTER_OTLP_* says), a URL, false; auto if OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_METRICS_ENDPOINT is set or OTEL_METRICS_EXPORTER is otlp, and not if that is none",
};
