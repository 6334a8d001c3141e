//! [`Inspect`]: where the live page is served, and what it may do.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};

use crate::config::ConfigError;
use crate::serving::hosts;

/// The live page's settings: for [`Builder::inspect`](crate::Builder::inspect), which takes a plain
/// address too, and for [`Conntrack::inspect_router_with`](crate::Conntrack::inspect_router_with).
///
/// ```
/// use otel_conntrack::{Conntrack, Inspect};
///
/// let page = Inspect::at("127.0.0.1:0")
///     .trace_link("http://localhost:16686/trace/{trace_id}")
///     .actions(true);
/// let conntrack = Conntrack::builder().inspect(page).build()?;
/// println!("http://{}/", conntrack.inspect_addr().unwrap());
/// # Ok::<(), otel_conntrack::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Inspect {
    pub(crate) address: Option<String>,
    allow_non_loopback: bool,
    hosts: Vec<String>,
    actions: bool,
    trace_link: Option<String>,
    title: Option<String>,
    pub(crate) timelines: bool,
}

/// What the page goes by, once it was checked.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Names that may stand in `Host`, in lower case.
    pub(crate) hosts: Vec<String>,
    pub(crate) actions: bool,
    pub(crate) trace_link: Option<String>,
    pub(crate) title: String,
}

impl Inspect {
    /// Served at this address, `host:port`, by a thread of its own: it answers also while the
    /// application's runtime is stuck. Port 0 takes any free one.
    ///
    /// The page shows who is connected to whom, so the address has to be a loopback one, unless
    /// [`allow_non_loopback`](Self::allow_non_loopback) says otherwise. Whoever can reach it can read
    /// it: it has no passwords. From afar, use `ssh -L` or a proxy that asks for one.
    pub fn at(address: impl Into<String>) -> Self {
        Self {
            address: Some(address.into()),
            ..Self::new()
        }
    }

    /// For a router, which is served wherever it is mounted.
    pub const fn new() -> Self {
        Self {
            address: None,
            allow_non_loopback: false,
            hosts: Vec::new(),
            actions: false,
            trace_link: None,
            title: None,
            timelines: false,
        }
    }

    /// Whether the address may be one that other hosts can reach. Default: no.
    ///
    /// **WARNING**: the page tells everyone who reaches it the addresses of your peers, and with
    /// [`actions`](Self::actions) lets them close connections. Set it only where a firewall or a
    /// network policy stands in front, such as in a container whose port is published to loopback.
    pub const fn allow_non_loopback(mut self, allow: bool) -> Self {
        self.allow_non_loopback = allow;
        self
    }

    /// One more name under which the page may be asked for: what stands in the browser's address bar,
    /// without the port. Default: `localhost`, names that end in `.localhost`, and IP addresses.
    ///
    /// A name of an attacker that resolves to your loopback (DNS rebinding) is none of these, so no
    /// page of theirs can read this one.
    pub fn allow_host(mut self, name: impl Into<String>) -> Self {
        self.hosts.push(name.into());
        self
    }

    /// Whether the page offers to close a connection, to close what is idle, and to drain a listener.
    /// Default: no; it only shows.
    ///
    /// Each takes a POST from the page itself, with a token that only the page knows.
    pub const fn actions(mut self, offer: bool) -> Self {
        self.actions = offer;
        self
    }

    /// Where a trace can be seen: an `http` or `https` URL with `{trace_id}` in it, and `{span_id}` if
    /// you like. Default: none, and trace ids are plain text.
    ///
    /// Jaeger: `http://localhost:16686/trace/{trace_id}`. Grafana with Tempo: the URL of *Explore*, with
    /// `{trace_id}` as the query.
    pub fn trace_link(mut self, template: impl Into<String>) -> Self {
        self.trace_link = Some(template.into());
        self
    }

    /// What the page is headed by, such as the service's name. Default: the program's name.
    pub fn title(mut self, title: impl Into<String>) -> Self {
        self.title = Some(title.into());
        self
    }

    /// Whether connections keep their timelines for the page, also where no span is sampled: the first
    /// and the last 24 changes of state each. Default: no, so only connections whose spans are sampled have
    /// one.
    ///
    /// It costs about half a KiB of memory for each connection that is open, up to 3 KiB for busy ones,
    /// and with each change of state a lock and a look at the clock: some 4 % of the throughput of a server
    /// that does nothing else.
    pub const fn timelines(mut self, keep: bool) -> Self {
        self.timelines = keep;
        self
    }

    /// The listener, bound, if it has an address of its own.
    pub(crate) fn bind(&self) -> Result<Option<TcpListener>, ConfigError> {
        let Some(address) = &self.address else {
            return Ok(None);
        };
        let bad = |help: &str| ConfigError::new("inspect", address, help);
        let addresses: Vec<SocketAddr> = address
            .to_socket_addrs()
            .map_err(|error| {
                bad("give it as host:port, such as 127.0.0.1:6060").with_source(error)
            })?
            .collect();
        let remote = |address: &&SocketAddr| !address.ip().to_canonical().is_loopback();
        if !self.allow_non_loopback && addresses.iter().any(|address| remote(&address)) {
            return Err(bad(
                "other hosts could reach the live page there; choose a loopback address such as \
                 127.0.0.1:6060, or say `Inspect::at(..).allow_non_loopback(true)`",
            ));
        }
        let listener = TcpListener::bind(&addresses[..]).map_err(|error| {
            bad("free the address, choose another, or give port 0 to take any free one")
                .with_source(error)
        })?;
        Ok(Some(listener))
    }

    pub(crate) fn settings(&self) -> Result<Settings, ConfigError> {
        let mut names = Vec::new();
        for host in &self.hosts {
            let Some(name) = hosts::name(host) else {
                return Err(ConfigError::new(
                    "inspect allow_host",
                    host,
                    "give a host's name as it stands in the browser's address bar, without scheme \
                     and port",
                ));
            };
            names.push(name);
        }
        if let Some(link) = &self.trace_link {
            let scheme = link.split_once("://").map(|(scheme, _)| scheme);
            let web = scheme.is_some_and(|scheme| {
                ["http", "https"]
                    .iter()
                    .any(|web| scheme.eq_ignore_ascii_case(web))
            });
            if !web || !link.contains("{trace_id}") || link.chars().any(char::is_control) {
                return Err(ConfigError::new(
                    "inspect trace_link",
                    link,
                    "give an http or https URL with {trace_id} in it, such as \
                     http://localhost:16686/trace/{trace_id}",
                ));
            }
        }
        let program = || {
            let program = std::env::current_exe().ok();
            let name = program.as_deref().and_then(std::path::Path::file_stem);
            name.map_or_else(
                || "this service".into(),
                |name| name.to_string_lossy().into_owned(),
            )
        };
        Ok(Settings {
            hosts: names,
            actions: self.actions,
            trace_link: self.trace_link.clone(),
            title: self.title.clone().unwrap_or_else(program),
        })
    }
}

impl Default for Inspect {
    fn default() -> Self {
        Self::new()
    }
}

impl From<&str> for Inspect {
    fn from(address: &str) -> Self {
        Self::at(address)
    }
}

impl From<String> for Inspect {
    fn from(address: String) -> Self {
        Self::at(address)
    }
}

impl From<SocketAddr> for Inspect {
    fn from(address: SocketAddr) -> Self {
        Self::at(address.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(inspect: &Inspect) -> String {
        match inspect.bind() {
            Err(error) => error.to_string(),
            Ok(_) => inspect.settings().unwrap_err().to_string(),
        }
    }

    #[test]
    fn what_others_could_reach_takes_an_explicit_word() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "[::ffff:192.0.2.1]:0"] {
            let text = refused(&Inspect::at(address));
            assert!(
                text.contains(address) && text.contains("allow_non_loopback"),
                "{text}"
            );
        }
        for address in ["127.0.0.1:0", "127.1.2.3:0", "localhost:0"] {
            assert!(Inspect::at(address).bind().unwrap().is_some(), "{address}");
        }
        let open = Inspect::at("0.0.0.0:0").allow_non_loopback(true).bind();
        assert!(open.unwrap().is_some());
    }

    #[test]
    fn what_is_wrong_names_setting_value_and_way_out() {
        for (inspect, parts) in [
            (Inspect::at(":6060"), ["inspect = ", "127.0.0.1:6060"]),
            (Inspect::at("6060"), ["\"6060\"", "host:port"]),
            (
                Inspect::new().allow_host("http://a"),
                ["allow_host", "without scheme"],
            ),
            (Inspect::new().allow_host(""), ["allow_host", "address bar"]),
            (
                Inspect::new().trace_link("javascript:alert(1)//{trace_id}"),
                ["trace_link", "https"],
            ),
            (
                Inspect::new().trace_link("http://jaeger/trace/"),
                ["trace_link", "{trace_id}"],
            ),
        ] {
            let text = refused(&inspect);
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        }
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let text = refused(&Inspect::from(taken.local_addr().unwrap()));
        assert!(text.contains("free the address"), "{text}");
    }
}
