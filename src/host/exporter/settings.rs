//! What was said: by flags, by the environment, by the file, by nobody. All of it is checked before
//! anything is started.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::Flags;
use super::file::{self, Line};
use super::specs::{self, CONFIG, Spec};
use crate::config::ConfigError;
use crate::host::ports::service;
use crate::host::{GroupBy, Monitor, MonitorBuilder, Ports};
use crate::serving::hosts;

/// The longest `duration`, seconds: ten years.
const LONGEST: u64 = 10 * 365 * 86_400;

/// The most `rows`, as [`MonitorBuilder::rows`] takes them.
const MOST_ROWS: usize = 1_800;
/// The highest `limit`: more than a kernel has descriptors for, and no memory for a slip of the pen.
const MOST_SOCKETS: usize = 100_000_000;

/// Where a value was said.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Origin {
    Default,
    Flag(String),
    Variable(String),
    File(PathBuf, usize),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Flag(name) => write!(f, "flag --{name}"),
            Self::Variable(name) => write!(f, "environment variable {name}"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
        }
    }
}

/// A value as it was said.
#[derive(Clone, Debug)]
pub(super) struct Said {
    pub(super) name: &'static str,
    pub(super) value: String,
    pub(super) origin: Origin,
}

impl Said {
    /// How errors call it.
    fn setting(&self) -> String {
        format!("{} ({})", self.name, self.origin)
    }

    fn wrong(&self, help: &str) -> ConfigError {
        ConfigError::new(&self.setting(), &self.value, help)
    }

    /// As Go's `strconv.ParseBool`.
    fn boolean(&self) -> Result<bool, ConfigError> {
        match &*self.value {
            "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
            "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
            _ => {
                Err(self
                    .wrong("must be true or false (or 1, t, T, TRUE, True, 0, f, F, FALSE, False)"))
            }
        }
    }
}

/// Whether and where to metrics are sent.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Otlp {
    /// As the environment says.
    Auto,
    Off,
    /// To where the environment says.
    On,
    To(String),
}

/// All of it, decided.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) simple: bool,
    pub(super) ipv6: bool,
    pub(super) ports: Ports,
    pub(super) listen: SocketAddr,
    /// The names under which it may be asked, as [`hosts::is_known`] takes them; none if under any.
    pub(super) allowed: Option<Vec<String>>,
    pub(super) duration: Duration,
    pub(super) period: Duration,
    pub(super) group_by: GroupBy,
    rows: usize,
    limit: usize,
    /// Another than this system's.
    proc_root: Option<PathBuf>,
    pub(super) otlp: Otlp,
    /// All of them, in the order of [`specs::SETTINGS`].
    pub(super) said: Vec<Said>,
    /// The file, if there was one.
    pub(super) config: Option<(PathBuf, Origin)>,
}

/// From a variable's name to its value.
type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Settings {
    pub(super) fn read(flags: &Flags, environment: Environment<'_>) -> Result<Self, ConfigError> {
        let config = config(flags, environment)?;
        let lines = match &config {
            Some((path, origin)) => file::read(path, &origin.to_string())?,
            None => Vec::new(),
        };
        Self::decide(flags, environment, config, &lines)
    }

    /// From what was said everywhere; `lines` are the file's.
    pub(super) fn decide(
        flags: &Flags,
        environment: Environment<'_>,
        config: Option<(PathBuf, Origin)>,
        lines: &[Line],
    ) -> Result<Self, ConfigError> {
        let path = config.as_ref();
        let path = path.map_or_else(|| Path::new(""), |(path, _)| path);
        let mut said = Vec::new();
        let mut find = |spec: &Spec| -> Result<Said, ConfigError> {
            let found = find(spec, flags, environment, path, lines)?;
            said.push(found.clone());
            Ok(found)
        };
        let simple = find(&specs::SIMPLE)?;
        let tcpv6 = find(&specs::TCPV6)?;
        let port = find(&specs::PORT)?;
        let listen = find(&specs::LISTEN)?;
        let allow_host = find(&specs::ALLOW_HOST)?;
        let duration = find(&specs::DURATION)?;
        let period = find(&specs::PERIOD)?;
        let group_by = find(&specs::GROUP_BY)?;
        let rows = find(&specs::ROWS)?;
        let limit = find(&specs::LIMIT)?;
        let proc_root = find(&specs::PROC_ROOT)?;
        let otlp = find(&specs::OTLP)?;
        let ports = Ports::parse(&port.setting(), &port.value, service)?;
        let own = read_listen(&listen)?;
        // A table is printed by one who does not listen.
        if !flags.once() && ports.without(own.port()).is_none() {
            return Err(port.wrong(
                "this is the exporter's own port (listen), which is left out, so nothing is left; \
                 give another",
            ));
        }
        let names = read_names(&allow_host)?;
        // Who listens for others is asked under names that we can't know, and has no access control.
        let checks = own.ip().to_canonical().is_loopback() || allow_host.origin != Origin::Default;
        let group = group_by
            .value
            .parse::<GroupBy>()
            .map_err(|error| error.with_setting(group_by.setting()))?;
        if group == GroupBy::Cgroup && proc_root.origin != Origin::Default {
            return Err(group_by.wrong(
                "only netlink tells cgroups, and it is not used with another /proc; leave out proc-root \
                 or this",
            ));
        }
        let root = PathBuf::from(&proc_root.value);
        // Without /proc there may be netlink.
        if proc_root.origin != Origin::Default && !root.is_dir() {
            return Err(proc_root.wrong("there is no such directory; give one that has net/tcp"));
        }
        Ok(Self {
            simple: simple.boolean()?,
            ipv6: tcpv6.boolean()?,
            ports,
            listen: own,
            allowed: checks.then_some(names),
            duration: seconds(&duration)?,
            period: read_period(&period)?,
            group_by: group,
            rows: read_count(&rows, MOST_ROWS)?,
            limit: read_count(&limit, MOST_SOCKETS)?,
            proc_root: (proc_root.origin != Origin::Default).then_some(root),
            otlp: read_otlp(&otlp)?,
            said,
            config,
        })
    }

    /// How errors call one of them.
    pub(super) fn setting(&self, spec: &Spec) -> String {
        let said = self.said.iter().find(|said| said.name == spec.name);
        said.map_or_else(|| spec.name.to_owned(), Said::setting)
    }

    /// For the host's table.
    pub(super) fn monitor(&self) -> MonitorBuilder {
        let monitor = Monitor::builder()
            .ports(self.ports.clone())
            .ipv6(self.ipv6)
            .duration(self.duration)
            .period(self.period)
            .group_by(self.group_by)
            .rows(self.rows)
            .limit(self.limit);
        match &self.proc_root {
            Some(root) => monitor.proc_root(root),
            None => monitor,
        }
    }
}

fn config(
    flags: &Flags,
    environment: Environment<'_>,
) -> Result<Option<(PathBuf, Origin)>, ConfigError> {
    let (flag, variable) = CONFIG;
    if let Some(path) = flags.get(flag) {
        return Ok(Some((path.into(), Origin::Flag(flag.to_owned()))));
    }
    let path = environment(variable).filter(|path| !path.is_empty());
    Ok(path.map(|path| (path.into(), Origin::Variable(variable.to_owned()))))
}

/// A flag goes before the environment, that before the file.
fn find(
    spec: &Spec,
    flags: &Flags,
    environment: Environment<'_>,
    path: &Path,
    lines: &[Line],
) -> Result<Said, ConfigError> {
    let said = |value: OsString, origin: Origin| {
        let lossy = value.to_string_lossy().trim().to_owned();
        let said = Said {
            name: spec.name,
            value: lossy,
            origin,
        };
        if value.to_str().is_none() {
            return Err(said.wrong("must be Unicode; write it in UTF-8"));
        }
        Ok(said)
    };
    if let Some(value) = flags.get(spec.name) {
        return said(value, Origin::Flag(spec.name.to_owned()));
    }
    let variable = spec.variable();
    // One that is empty is not set.
    if let Some(value) = environment(&variable).filter(|value| !value.is_empty()) {
        return said(value, Origin::Variable(variable));
    }
    if let Some(line) = lines.iter().find(|line| line.name == spec.name) {
        let origin = Origin::File(path.to_owned(), line.number);
        return said(line.value.clone().into(), origin);
    }
    said(spec.default.into(), Origin::Default)
}

fn read_listen(said: &Said) -> Result<SocketAddr, ConfigError> {
    if let Ok(address) = said.value.parse::<SocketAddr>() {
        return Ok(address);
    }
    let port = said.value.strip_prefix("localhost:");
    let port = port.unwrap_or(&said.value);
    if let Ok(port) = port.parse::<u16>() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    let digits = port.strip_prefix('-').unwrap_or(port);
    let help = if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        "is out of range; a port is from 1 to 65535, and 0 takes a free one"
    } else {
        "must be a port, such as 9690, or an address and a port, such as 0.0.0.0:9690 or [::]:9690"
    };
    Err(said.wrong(help))
}

fn read_names(said: &Said) -> Result<Vec<String>, ConfigError> {
    let name = |text: &str| {
        hosts::name(text.trim()).ok_or_else(|| {
            said.wrong(
                "must be names of hosts, without scheme and port, such as exporter.internal,node1; \
                 IP addresses are answered anyway",
            )
        })
    };
    said.value.split(',').map(name).collect()
}

fn seconds(said: &Said) -> Result<Duration, ConfigError> {
    let seconds = said.value.parse::<u64>().ok();
    let seconds = seconds.filter(|seconds| *seconds <= LONGEST);
    let help = "must be whole seconds, from 0 to 315360000 (ten years)";
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| said.wrong(help))
}

fn read_period(said: &Said) -> Result<Duration, ConfigError> {
    let seconds = said.value.parse::<f64>().ok();
    let seconds = seconds.filter(|seconds| (0.1..=3_600.0).contains(seconds));
    let help = "must be seconds, from 0.1 to 3600";
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| said.wrong(help))
}

fn read_count(said: &Said, most: usize) -> Result<usize, ConfigError> {
    let count = said.value.parse().ok();
    let count = count.filter(|count| (1..=most).contains(count));
    count.ok_or_else(|| said.wrong(&format!("must be a whole number from 1 to {most}")))
}

fn read_otlp(said: &Said) -> Result<Otlp, ConfigError> {
    if said.value == "auto" {
        return Ok(Otlp::Auto);
    }
    if said.value.contains("://") {
        return Ok(Otlp::To(said.value.clone()));
    }
    match said.boolean() {
        Ok(true) => Ok(Otlp::On),
        Ok(false) => Ok(Otlp::Off),
        Err(_) => {
            Err(said.wrong("must be true, false, auto, or a URL such as http://localhost:4317"))
        }
    }
}

#[cfg(test)]
mod tests;
