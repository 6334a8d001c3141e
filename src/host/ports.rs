//! Which ports are looked at: said by people, understood by the kernel.
//!
//! The kernel runs a small program over each socket of a dump (`INET_DIAG_REQ_BYTECODE`) and sends
//! the rows that the program lets pass. That is where the time goes: a row that is not sent costs a
//! tenth of one that is.

use std::fmt;
use std::ops::RangeInclusive;

use crate::config::ConfigError;

/// How many ranges of ports are taken, after those that touch are made one.
const MOST: usize = 256;
/// How long one word may be.
const LONGEST_WORD: usize = 64;
/// Where names of ports come from, as for every program of the system.
const SERVICES: &str = "/etc/services";
/// How much of it is read.
const SERVICES_BYTES: u64 = 4 << 20;

/// The local ports whose connections are looked at. The default is all of them.
///
/// ```
/// use otel_conntrack::host::Ports;
///
/// let ports: Ports = "443, 8080-8090, ssh".parse()?;
/// assert!(ports.contains(8085) && ports.contains(22) && !ports.contains(80));
/// assert_eq!(ports.to_string(), "22,443,8080-8090");
/// assert!(Ports::ALL.contains(1) && "-1".parse::<Ports>()? == Ports::ALL);
/// # Ok::<(), otel_conntrack::ConfigError>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Ports {
    /// Sorted, and none touches the next. None for all.
    ranges: Option<Vec<(u16, u16)>>,
}

impl Ports {
    /// Every port.
    pub const ALL: Self = Self { ranges: None };

    /// These ports.
    ///
    /// # Errors
    ///
    /// None at all, or more than 256 ranges once those that touch are made one.
    pub fn new(ranges: impl IntoIterator<Item = RangeInclusive<u16>>) -> Result<Self, ConfigError> {
        let ranges = ranges
            .into_iter()
            .map(|range| (*range.start(), *range.end()));
        Self::from_pairs("ports", "ranges", ranges.collect())
    }

    fn from_pairs(
        setting: &str,
        value: &str,
        mut ranges: Vec<(u16, u16)>,
    ) -> Result<Self, ConfigError> {
        ranges.retain(|(low, high)| low <= high);
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (low, high) in ranges {
            match merged.last_mut() {
                Some((_, end)) if u32::from(low) <= u32::from(*end) + 1 => *end = high.max(*end),
                _ => merged.push((low, high)),
            }
        }
        if merged.is_empty() {
            let help = "no port is in it; give one such as 443, or -1 for all";
            return Err(ConfigError::new(setting, value, help));
        }
        if merged.len() > MOST {
            let help = "these are more than 256 ranges of ports; give wider ranges, or -1 for all";
            return Err(ConfigError::new(setting, value, help));
        }
        let ranges = (merged != [(0, u16::MAX)]).then_some(merged);
        Ok(Self { ranges })
    }

    /// Reads `443`, `8080-8090`, `https` and lists of them; `-1` and `all` for all. `lookup` knows
    /// names.
    pub(crate) fn parse(
        setting: &str,
        text: &str,
        lookup: impl Fn(&str) -> Option<u16>,
    ) -> Result<Self, ConfigError> {
        let wrong = |word: &str, help: &str| {
            let help = format!("{word:?} {help}");
            Err(ConfigError::new(setting, text, &help))
        };
        let text = text.trim();
        if matches!(text, "-1" | "all") {
            return Ok(Self::ALL);
        }
        let mut ranges = Vec::new();
        for word in text.split(',').map(str::trim) {
            if word.len() > LONGEST_WORD {
                let begin: String = word.chars().take(LONGEST_WORD).collect();
                return wrong(
                    &begin,
                    "is too long for a port; write ports as 443,8080-8090",
                );
            }
            let one = |word: &str| match word.parse::<u32>() {
                Ok(number) => u16::try_from(number).ok().filter(|port| *port > 0),
                Err(_) => None,
            };
            let range = if let Some(port) = one(word) {
                (port, port)
            } else if let Some((low, high)) = word.split_once('-')
                && let (Some(low), Some(high)) = (one(low.trim()), one(high.trim()))
            {
                if low > high {
                    return wrong(word, "runs backwards; write the smaller port first");
                }
                (low, high)
            } else if word.is_empty() {
                return wrong(
                    word,
                    "is no port; write ports as 443,8080-8090,https, or -1 for all",
                );
            } else if word == "-1" || word == "all" {
                return wrong(
                    word,
                    "means all ports and can't stand in a list; give it alone",
                );
            } else if word
                .bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'-')
            {
                return wrong(
                    word,
                    "is out of range; a port is from 1 to 65535, and -1 means all",
                );
            } else if let Some(port) = lookup(word) {
                (port, port)
            } else {
                return wrong(
                    word,
                    "is no port that /etc/services names; write its number",
                );
            };
            ranges.push(range);
        }
        Self::from_pairs(setting, text, ranges)
    }

    /// Whether this port is looked at.
    pub fn contains(&self, port: u16) -> bool {
        match &self.ranges {
            None => true,
            Some(ranges) => ranges
                .iter()
                .any(|(low, high)| (*low..=*high).contains(&port)),
        }
    }

    /// Whether it is every port.
    pub const fn is_all(&self) -> bool {
        self.ranges.is_none()
    }

    /// What is left without this port; none if nothing is.
    pub(crate) fn without(&self, port: u16) -> Option<Self> {
        let ranges = self.ranges.as_deref().unwrap_or(&[(0, u16::MAX)]);
        let mut left = Vec::new();
        for &(low, high) in ranges {
            if (low..=high).contains(&port) {
                left.extend(
                    port.checked_sub(1)
                        .filter(|end| *end >= low)
                        .map(|end| (low, end)),
                );
                left.extend(
                    port.checked_add(1)
                        .filter(|start| *start <= high)
                        .map(|start| (start, high)),
                );
            } else {
                left.push((low, high));
            }
        }
        (!left.is_empty()).then_some(Self { ranges: Some(left) })
    }

    /// The kernel's program for it: `struct inet_diag_bc_op` of include/uapi/linux/inet_diag.h, where
    /// `yes` and `no` say how many bytes to go on. To end exactly at the end lets a socket pass, to
    /// go four bytes beyond does not.
    ///
    /// Per range: `if port < low goto next; if port > high goto next; goto end`.
    pub(crate) fn program(&self) -> Vec<u8> {
        const JMP: u8 = 1;
        const S_GE: u8 = 2;
        const S_LE: u8 = 3;
        /// Two comparisons of two words each, and a jump.
        const RANGE: u16 = 20;
        let mut program = Vec::new();
        let ranges = self.ranges.as_deref().unwrap_or_default();
        let mut op = |code: u8, yes: u8, no: u16| {
            program.push(code);
            program.push(yes);
            program.extend(no.to_ne_bytes());
        };
        for (n, (low, high)) in ranges.iter().enumerate() {
            op(S_GE, 8, RANGE);
            op(0, 0, *low);
            op(S_LE, 8, RANGE - 8);
            op(0, 0, *high);
            // At most 255 ranges come after it, of which the last has no jump: 5 096 bytes.
            let after = (ranges.len() - n - 1) as u16;
            if after > 0 {
                op(JMP, 4, 4 + after * RANGE - 4);
            }
        }
        program
    }
}

impl Default for Ports {
    fn default() -> Self {
        Self::ALL
    }
}

impl std::str::FromStr for Ports {
    type Err = ConfigError;

    /// `443`, `8080-8090`, `https` (a name of `/etc/services`), and lists of them; `-1` or `all` for
    /// all. An error names the word that is no port.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::parse("ports", text, service)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(ranges) = &self.ranges else {
            return f.write_str("all");
        };
        for (n, (low, high)) in ranges.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            if low == high {
                write!(f, "{comma}{low}")?;
            } else {
                write!(f, "{comma}{low}-{high}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ports({self})")
    }
}

/// The port of a TCP service; from the system's list, or from this one where there is none, as in a
/// small container.
pub(crate) fn service(name: &str) -> Option<u16> {
    let listed = read_services().and_then(|text| find_service(&text, name));
    let known = || KNOWN.iter().find(|(known, _)| *known == name);
    listed.or_else(|| known().map(|(_, port)| *port))
}

/// The name of a TCP port, for people; as [`service`].
#[cfg(feature = "exporter")]
pub(crate) fn service_names() -> std::collections::HashMap<u16, String> {
    let mut names: std::collections::HashMap<_, _> = KNOWN
        .iter()
        .map(|(name, port)| (*port, (*name).to_owned()))
        .collect();
    for (name, port, _) in read_services().iter().flat_map(|text| services(text)) {
        names.insert(port, name.to_owned());
    }
    names
}

const KNOWN: &[(&str, u16)] = &[
    ("ftp", 21),
    ("ssh", 22),
    ("smtp", 25),
    ("domain", 53),
    ("http", 80),
    ("https", 443),
    ("mysql", 3306),
    ("postgresql", 5432),
    ("amqp", 5672),
    ("redis", 6379),
    ("http-alt", 8080),
];

fn read_services() -> Option<String> {
    let mut text = Vec::new();
    let file = std::fs::File::open(SERVICES).ok()?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, SERVICES_BYTES), &mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// services(5): `name port/tcp alias...`, and `#` begins a comment.
fn services(text: &str) -> impl Iterator<Item = (&str, u16, impl Iterator<Item = &str>)> {
    text.lines().filter_map(|line| {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        let name = words.next()?;
        let port = words.next()?.strip_suffix("/tcp")?.parse().ok()?;
        Some((name, port, words))
    })
}

pub(super) fn find_service(text: &str, wanted: &str) -> Option<u16> {
    services(text)
        .find(|(name, ..)| *name == wanted)
        .or_else(|| {
            services(text).find_map(|(n, p, mut aliases)| {
                aliases
                    .any(|alias| alias == wanted)
                    .then_some((n, p, aliases))
            })
        })
        .map(|(_, port, _)| port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Ports, ConfigError> {
        let lookup = |name: &str| find_service("www 80/tcp http # WorldWideWeb\nx-1 7/tcp", name);
        Ports::parse("--port", text, lookup)
    }

    #[test]
    fn lists_ranges_and_names_become_sorted_ranges() {
        for (text, shown) in [
            ("443", "443"),
            (" 443 , 80 ", "80,443"),
            ("8080-8090,8085,8091", "8080-8091"),
            ("http,www,x-1", "7,80"),
            ("1-65535", "1-65535"),
            ("-1", "all"),
            ("all", "all"),
        ] {
            assert_eq!(parse(text).unwrap().to_string(), shown, "{text}");
        }
        assert_eq!("ssh".parse::<Ports>().unwrap().to_string(), "22");
        assert_eq!(Ports::new([0..=u16::MAX]).unwrap(), Ports::ALL);
    }

    #[test]
    fn what_is_no_port_is_an_error_that_names_it() {
        for (text, word) in [
            ("0", "out of range"),
            ("65536", "out of range"),
            ("99999999999999999999", "out of range"),
            ("-2", "out of range"),
            ("80-70", "backwards"),
            ("80-", "out of range"),
            ("", "no port"),
            ("80,,81", "no port"),
            ("80,-1", "alone"),
            ("nothing-like-it", "/etc/services"),
            (&"é".repeat(80), "too long"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.setting(), "--port");
            assert!(error.to_string().contains(word), "{text}: {error}");
        }
        let many = (1..=257).map(|n| (n * 2).to_string()).collect::<Vec<_>>();
        assert!(
            parse(&many.join(","))
                .unwrap_err()
                .to_string()
                .contains("256")
        );
        assert!(parse(&many[..256].join(",")).is_ok());
        assert!(Ports::new([]).is_err());
    }

    #[test]
    fn a_port_is_taken_out() {
        for (text, port, left) in [
            ("-1", 9690, Some("0-9689,9691-65535")),
            ("-1", 0, Some("1-65535")),
            ("-1", 65535, Some("0-65534")),
            ("80-82", 80, Some("81-82")),
            ("80-82", 82, Some("80-81")),
            ("80-82", 81, Some("80,82")),
            ("80-82", 90, Some("80-82")),
            ("80", 80, None),
        ] {
            let without = parse(text).unwrap().without(port);
            assert_eq!(without.map(|ports| ports.to_string()).as_deref(), left);
        }
    }

    /// As `inet_diag_bc_run` of the kernel's net/ipv4/inet_diag.c.
    fn run(program: &[u8], port: u16) -> bool {
        let word = |at: usize| u16::from_ne_bytes([program[at + 2], program[at + 3]]);
        let mut at = 0;
        while at < program.len() {
            let yes = match program[at] {
                1 => false,
                2 => port >= word(at + 4),
                3 => port <= word(at + 4),
                other => panic!("no operation {other}"),
            };
            at += if yes {
                usize::from(program[at + 1])
            } else {
                usize::from(word(at))
            };
        }
        assert!(at == program.len() || at == program.len() + 4, "{at}");
        at == program.len()
    }

    proptest::proptest! {
        #[test]
        fn the_program_lets_pass_what_is_in(
            ranges in proptest::collection::vec((0..=u16::MAX, 0..300_u16), 1..20),
            others: Vec<u16>,
        ) {
            let ranges: Vec<_> = ranges
                .into_iter()
                .map(|(low, length)| low..=low.saturating_add(length))
                .collect();
            let ports = Ports::new(ranges.clone()).unwrap();
            let program = ports.program();
            let edges = ranges.iter().flat_map(|range| {
                let (low, high) = (*range.start(), *range.end());
                [low, high, low.saturating_sub(1), high.saturating_add(1)]
            });
            for port in edges.chain(others) {
                let expected = ranges.iter().any(|range| range.contains(&port));
                assert_eq!(ports.contains(port), expected);
                assert!(ports.is_all() || run(&program, port) == expected, "{port} {ports}");
            }
            assert_eq!(ports.is_all(), program.is_empty());
        }

        #[test]
        fn no_text_is_too_wild(text: String, near in "[-0-9a,]{0,30}") {
            let _ = parse(&text);
            let _ = parse(&near);
            let _ = services(&text).count();
        }
    }
}
