//! How the host's table is looked at.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::{Monitor, Ports, Scanner};
use crate::config::ConfigError;

/// The shortest and the longest period between scans.
const PERIODS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(3_600)];
/// The longest `duration`: ten years.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Sets up a [`Monitor`] or a [`Scanner`]. From [`Monitor::builder`].
///
/// ```
/// # #[cfg(target_os = "linux")] {
/// use std::time::Duration;
/// use otel_conntrack::host::Monitor;
///
/// let mut scanner = Monitor::builder().duration(Duration::ZERO).ipv6(false).scanner()?;
/// let snapshot = scanner.scan()?;
/// println!("{} connections on {} ports", snapshot.established(), snapshot.connections.len());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "call `start()` or `scanner()`"]
pub struct MonitorBuilder {
    pub(super) ports: Ports,
    pub(super) ipv6: bool,
    pub(super) duration: Duration,
    pub(super) period: Duration,
    pub(super) own_port: Option<u16>,
    pub(super) leave_out_self: bool,
    pub(super) group_by: GroupBy,
    pub(super) proc_root: Option<PathBuf>,
    pub(super) netlink: bool,
    pub(super) limit: usize,
    pub(super) groups: usize,
}

impl Default for MonitorBuilder {
    fn default() -> Self {
        Self {
            ports: Ports::ALL,
            ipv6: true,
            duration: Duration::from_secs(6),
            period: Duration::from_secs(1),
            own_port: None,
            leave_out_self: false,
            group_by: GroupBy::Nothing,
            proc_root: None,
            netlink: true,
            limit: 2_000_000,
            groups: 1_000,
        }
    }
}

impl MonitorBuilder {
    /// Only connections with these local ports, filtered in the kernel. Default: all.
    pub fn ports(mut self, ports: Ports) -> Self {
        self.ports = ports;
        self
    }

    /// Whether IPv6 is looked at too. Default: yes. IPv4 over an IPv6 socket is IPv4, and always is.
    pub const fn ipv6(mut self, on: bool) -> Self {
        self.ipv6 = on;
        self
    }

    /// How long a connection is established before it is long-term, in real time. Default 6 s, at most
    /// ten years; zero counts each.
    pub const fn duration(mut self, duration: Duration) -> Self {
        self.duration = duration;
        self
    }

    /// How often the table is read. Default 1 s; from 100 ms to an hour. Where reading takes long, it
    /// is done less often: at most a tenth of the time.
    pub const fn period(mut self, period: Duration) -> Self {
        self.period = period;
        self
    }

    /// Leaves out a port of the watcher's own: its listener, the connections to it, and their other
    /// ends where those are on this host too. Default: none.
    pub const fn leave_out_port(mut self, port: u16) -> Self {
        self.own_port = Some(port);
        self
    }

    /// Leaves out every socket that this process holds, such as its exporters' own. Default: no. Costs
    /// a system call per open file and scan.
    pub const fn leave_out_self(mut self, on: bool) -> Self {
        self.leave_out_self = on;
        self
    }

    /// What connections are counted by besides direction, port and family. Default: nothing.
    pub const fn group_by(mut self, group_by: GroupBy) -> Self {
        self.group_by = group_by;
        self
    }

    /// Reads the tables under another `/proc`, such as the host's that is mounted into a container:
    /// `{root}/1/net/tcp`, which is the network of that host's first process, or `{root}/net/tcp` if it
    /// is a directory without processes. Default: the kernel is asked for the network of this process. It costs about twice
    /// as much, and does not know cgroups.
    pub fn proc_root(mut self, root: impl Into<PathBuf>) -> Self {
        self.proc_root = Some(root.into());
        self
    }

    /// Whether the kernel may be asked over netlink; without it, `/proc/net/tcp` is read. Default: yes.
    pub const fn netlink(mut self, on: bool) -> Self {
        self.netlink = on;
        self
    }

    /// How many sockets are tracked at most; those beyond are counted in [`Scan::untracked`]. Default
    /// 2 000 000, which takes about 120 MB when they are there.
    ///
    /// [`Scan::untracked`]: super::Scan::untracked
    pub const fn limit(mut self, sockets: usize) -> Self {
        self.limit = sockets;
        self
    }

    /// How many rows [`Snapshot::connections`] has at most, besides those without a port, in which the
    /// rest is summed. Default 1 000; from 1 to 1 800.
    ///
    /// [`Snapshot::connections`]: super::Snapshot::connections
    pub const fn rows(mut self, rows: usize) -> Self {
        self.groups = rows;
        self
    }

    /// A scanner, for whoever has a thread and a rhythm of his own.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start), but nothing is read yet.
    pub fn scanner(self) -> Result<Scanner, ConfigError> {
        Scanner::new(self)
    }

    /// Reads the table for the first time, and goes on on a thread of its own until the last clone of
    /// the monitor is dropped.
    ///
    /// # Errors
    ///
    /// A setting that can't be used; a table that can't be read, neither by netlink nor in `/proc`; a
    /// system other than Linux; no thread.
    pub fn start(self) -> Result<Monitor, ConfigError> {
        Monitor::start(self)
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let [shortest, longest] = PERIODS;
        if !(shortest..=longest).contains(&self.period) {
            let help = "must be from 100 ms to an hour";
            return Err(ConfigError::new(
                "period",
                &format!("{:?}", self.period),
                help,
            ));
        }
        if self.duration > LONGEST {
            let help = "must be at most ten years";
            return Err(ConfigError::new(
                "duration",
                &format!("{:?}", self.duration),
                help,
            ));
        }
        if !(1..=1_800).contains(&self.groups) {
            let help = "must be from 1 to 1800";
            return Err(ConfigError::new("rows", &self.groups.to_string(), help));
        }
        if self.group_by == GroupBy::Cgroup && (self.proc_root.is_some() || !self.netlink) {
            let help = "only netlink tells cgroups, and it is not used with another /proc; leave one of them out";
            return Err(ConfigError::new("group_by", "cgroup", help));
        }
        if let Some(port) = self.own_port
            && self.ports.without(port).is_none()
        {
            let help = "this is the watcher's own port, which is left out, so nothing is left; give another";
            return Err(ConfigError::new("ports", &self.ports.to_string(), help));
        }
        Ok(())
    }

    /// Where the tables are. In a real `/proc` `net` is a link to that of who looks, which is not what
    /// was asked for: there it is the first process's or an error, also where that is hidden from us.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))]
    pub(super) fn net(&self) -> PathBuf {
        let Some(root) = &self.proc_root else {
            return PathBuf::from("/proc/net");
        };
        let (first, own) = (root.join("1/net"), root.join("net"));
        let is_link = own.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
        if is_link || root.join("1").symlink_metadata().is_ok() {
            first
        } else {
            own
        }
    }
}

/// What connections are counted by besides direction, port and family.
///
/// ```
/// use otel_conntrack::host::GroupBy;
///
/// assert_eq!("subnet/24".parse::<GroupBy>()?, GroupBy::Subnet { v4: 24, v6: 64 });
/// assert_eq!("subnet/16/48".parse::<GroupBy>()?, GroupBy::Subnet { v4: 16, v6: 48 });
/// assert_eq!("cgroup".parse::<GroupBy>()?, GroupBy::Cgroup);
/// # Ok::<(), otel_conntrack::ConfigError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupBy {
    /// Nothing.
    #[default]
    Nothing,
    /// The peer's network: so many bits of its address. `subnet/24` is 24 bits of IPv4 and 64 of IPv6,
    /// `subnet/24/56` says both.
    Subnet {
        /// Bits of an IPv4 address, at most 32.
        v4: u8,
        /// Bits of an IPv6 address, at most 128.
        v6: u8,
    },
    /// The cgroup (version 2) of the process that made the socket: a service of systemd, a container.
    /// Linux 5.9, by netlink only; a cgroup whose directory is not to be seen is shown by its number.
    Cgroup,
}

impl FromStr for GroupBy {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bits = |text: &str, most: u8| text.parse().ok().filter(|bits| *bits <= most);
        let parsed = match text {
            "none" | "nothing" => Some(Self::Nothing),
            "cgroup" => Some(Self::Cgroup),
            _ => text.strip_prefix("subnet/").and_then(|rest| {
                let (v4, v6) = rest.split_once('/').unwrap_or((rest, "64"));
                let (v4, v6) = (bits(v4, 32)?, bits(v6, 128)?);
                Some(Self::Subnet { v4, v6 })
            }),
        };
        parsed.ok_or_else(|| {
            let help = "must be none, cgroup, subnet/24 (bits of IPv4, 64 of IPv6) or subnet/24/56 (of both)";
            ConfigError::new("group_by", text, help)
        })
    }
}

impl fmt::Display for GroupBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("none"),
            Self::Subnet { v4, v6 } => write!(f, "subnet/{v4}/{v6}"),
            Self::Cgroup => f.write_str("cgroup"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_read_as_they_are_shown() {
        for text in ["none", "cgroup", "subnet/0/0", "subnet/32/128"] {
            assert_eq!(text.parse::<GroupBy>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "subnet",
            "subnet/",
            "subnet/33",
            "subnet/24/129",
            "subnet/-1",
            "Cgroup",
        ] {
            let error = text.parse::<GroupBy>().unwrap_err();
            assert_eq!((error.setting(), error.value()), ("group_by", text));
        }
    }

    #[test]
    fn what_can_not_be_meant_is_refused() {
        let builder = Monitor::builder;
        let long = Duration::from_secs(u64::MAX);
        for (settings, setting) in [
            (builder().period(Duration::ZERO), "period"),
            (builder().period(long), "period"),
            (builder().duration(long), "duration"),
            (builder().rows(0), "rows"),
            (
                builder().group_by(GroupBy::Cgroup).netlink(false),
                "group_by",
            ),
            (
                builder().group_by(GroupBy::Cgroup).proc_root("/x"),
                "group_by",
            ),
            (
                builder().ports("80".parse().unwrap()).leave_out_port(80),
                "ports",
            ),
        ] {
            assert_eq!(settings.check().unwrap_err().setting(), setting);
        }
        assert!(builder().check().is_ok());
    }
}
