//! What the kernel counts about TCP: `net/snmp` and `net/netstat` of `/proc`.
//!
//! Both have pairs of lines that begin alike: names, and numbers.

use std::path::Path;

use super::TcpCounters;

/// How much of a file is read.
const LONGEST: u64 = 1 << 20;

/// What there is of it.
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
pub(super) fn read(directory: &Path) -> TcpCounters {
    let text = |name: &str| {
        let file = std::fs::File::open(directory.join(name)).ok()?;
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::io::Read::take(file, LONGEST), &mut text).ok()?;
        Some(text)
    };
    let snmp = text("snmp").unwrap_or_default();
    let netstat = text("netstat").unwrap_or_default();
    TcpCounters {
        segments_sent: find(&snmp, "Tcp:", "OutSegs"),
        retransmits: find(&snmp, "Tcp:", "RetransSegs"),
        listen_overflows: find(&netstat, "TcpExt:", "ListenOverflows"),
        listen_drops: find(&netstat, "TcpExt:", "ListenDrops"),
    }
}

impl TcpCounters {
    /// Those of `before` where there are none now.
    pub(super) fn or(self, before: &Self) -> Self {
        Self {
            segments_sent: self.segments_sent.or(before.segments_sent),
            retransmits: self.retransmits.or(before.retransmits),
            listen_overflows: self.listen_overflows.or(before.listen_overflows),
            listen_drops: self.listen_drops.or(before.listen_drops),
        }
    }
}

pub(super) fn find(text: &str, section: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(section));
    let names = lines.next()?.split_ascii_whitespace();
    let numbers = lines.next()?.split_ascii_whitespace();
    let (_, number) = names.zip(numbers).find(|(found, _)| *found == name)?;
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_section_and_name() {
        let text = "Ip: A B\nIp: 1 2\nTcp: A OutSegs MaxConn\nTcp: 7 8 -1\nTcpExt: A\n";
        assert_eq!(find(text, "Tcp:", "OutSegs"), Some(8));
        assert_eq!(find(text, "Tcp:", "A"), Some(7));
        for (section, name) in [
            ("Tcp:", "B"),
            ("Tcp:", "MaxConn"),
            ("TcpExt:", "A"),
            ("Udp:", "A"),
        ] {
            assert_eq!(find(text, section, name), None);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_system_has_them() {
        let counters = read(Path::new("/proc/net"));
        assert!(counters.segments_sent.is_some() && counters.retransmits.is_some());
        let nowhere = read(Path::new("/nowhere"));
        assert_eq!(nowhere, TcpCounters::default());
        assert_eq!(nowhere.or(&counters), counters);
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_wild(text: String) {
            find(&text, "Tcp:", "OutSegs");
            find(&format!("Tcp: {text}\nTcp: {text}"), "Tcp:", "OutSegs");
        }
    }
}
