//! What connections are counted by: direction, family, port, and a further label where asked for.
//!
//! Ports and peers are learned, so there is a bound: beyond it a socket is counted in the `_other` of
//! its direction and family, where it stays. A group that nobody is in gives its place away.

use std::collections::HashMap;

use crate::event::Direction;

/// The version of IP that goes over the wire.
///
/// An IPv6 socket with an IPv4-mapped address (`::ffff:192.0.2.1`), as a server on `[::]` has for its
/// IPv4 clients, counts as IPv4, though it stands in `/proc/net/tcp6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    /// As semantic conventions have it: `ipv4` or `ipv6`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }

    /// As tcp_established_exporter has it: `4` or `6`.
    pub const fn digit(self) -> &'static str {
        match self {
            Self::V4 => "4",
            Self::V6 => "6",
        }
    }
}

/// What a socket is counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct GroupKey {
    pub(super) direction: Direction,
    pub(super) ip: IpVersion,
    /// None beyond the bound.
    pub(super) port: Option<u16>,
    pub(super) label: Label,
}

impl GroupKey {
    const fn is_ports_other(&self) -> bool {
        self.port.is_some() && matches!(self.label, Label::Other)
    }

    /// The one of its direction and family that sums what has no port of its own.
    pub(super) const fn without_port(self) -> Self {
        let label = match self.label {
            Label::None => Label::None,
            Label::Subnet(..) | Label::Cgroup(_) | Label::Other => Label::Other,
        };
        Self {
            port: None,
            label,
            ..self
        }
    }
}

/// What else it is counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Label {
    None,
    /// The peer's network: its address with what is beyond the prefix taken away.
    Subnet([u8; 16], u8),
    /// The cgroup of the process that made the socket, by its number; zero where the kernel told none.
    Cgroup(u64),
    /// Beyond the bound.
    Other,
}

/// A group's number: 2 bytes for each socket instead of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group(u16);

impl Group {
    pub(super) fn index(self) -> usize {
        self.0.into()
    }
}

/// The groups there are.
#[derive(Debug)]
pub(super) struct Groups {
    list: Vec<(GroupKey, u32)>,
    numbers: HashMap<GroupKey, Group>,
    /// How many of them are what is beyond the bound of a port's labels.
    others: usize,
    free: Vec<Group>,
    limit: usize,
}

impl Groups {
    /// At most this many, as many ports' `_other` labels, and the four `_other` ports besides.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            list: Vec::new(),
            numbers: HashMap::new(),
            others: 0,
            free: Vec::new(),
            limit: limit.min(usize::from(u16::MAX / 2) - 8),
        }
    }

    /// The group of this key. Beyond the bound, that of its port with the label `_other`, so that a
    /// port's sum stays right whatever it is split by; where there are too many ports, the `_other` of
    /// its direction and family.
    pub(super) fn of(&mut self, key: GroupKey) -> Group {
        if let Some(group) = self.numbers.get(&key) {
            return *group;
        }
        let room = if key.is_ports_other() {
            self.others < self.limit
        } else {
            self.numbers.len() - self.others < self.limit
        };
        if room || key.port.is_none() {
            return self.add(key);
        }
        self.of(match key.label {
            Label::Subnet(..) | Label::Cgroup(_) => GroupKey {
                label: Label::Other,
                ..key
            },
            Label::None | Label::Other => key.without_port(),
        })
    }

    fn add(&mut self, key: GroupKey) -> Group {
        let group = match self.free.pop() {
            Some(group) => {
                self.list[group.index()] = (key, 0);
                group
            }
            None => {
                self.list.push((key, 0));
                Group((self.list.len() - 1) as u16)
            }
        };
        self.others += usize::from(key.is_ports_other());
        self.numbers.insert(key, group);
        group
    }

    pub(super) fn joins(&mut self, group: Group) {
        self.list[group.index()].1 += 1;
    }

    pub(super) fn leaves(&mut self, group: Group) {
        let (key, members) = &mut self.list[group.index()];
        *members -= 1;
        if *members == 0 {
            self.others -= usize::from(key.is_ports_other());
            self.numbers.remove(key);
            self.free.push(group);
        }
    }

    /// How many numbers have been given out; some may be free.
    pub(super) const fn numbers(&self) -> usize {
        self.list.len()
    }

    pub(super) fn key(&self, group: Group) -> &GroupKey {
        &self.list[group.index()].0
    }

    /// In the order of their numbers.
    pub(super) fn keys(&self) -> impl Iterator<Item = &GroupKey> {
        self.list.iter().map(|(key, _)| key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> GroupKey {
        GroupKey {
            direction: Direction::Inbound,
            ip: IpVersion::V4,
            port: Some(port),
            label: Label::Cgroup(port.into()),
        }
    }

    #[test]
    fn beyond_the_bound_is_other_and_a_place_that_is_left_is_given_again() {
        let mut groups = Groups::new(2);
        let join = |groups: &mut Groups, port| {
            let group = groups.of(key(port));
            groups.joins(group);
            group
        };
        let one = join(&mut groups, 1);
        assert_eq!(one, join(&mut groups, 1));
        join(&mut groups, 2);
        // First a port's labels are too many, then ports are.
        let thirds = join(&mut groups, 3);
        let of_third = groups.key(thirds);
        assert_eq!((of_third.port, of_third.label), (Some(3), Label::Other));
        join(&mut groups, 4);
        let other = join(&mut groups, 5);
        assert_eq!(other, join(&mut groups, 6));
        let of_rest = groups.key(other);
        assert_eq!((of_rest.port, of_rest.label), (None, Label::Other));
        groups.leaves(one);
        assert_eq!(one, join(&mut groups, 1));
        for left in [one, one, thirds, other, other] {
            groups.leaves(left);
        }
        // They are free: the bound counts what is there.
        let seven = join(&mut groups, 7);
        assert_eq!(*groups.key(seven), key(7));
        let eight = join(&mut groups, 8);
        let of_eight = groups.key(eight);
        assert_eq!((of_eight.port, of_eight.label), (Some(8), Label::Other));
        assert_eq!(groups.numbers(), 5);
    }

    #[test]
    fn a_ports_sum_is_the_same_however_many_labels_it_is_split_by() {
        let mut groups = Groups::new(10);
        let mut members: HashMap<GroupKey, u64> = HashMap::new();
        for n in 0..1_000 {
            let port = 1 + n % 3;
            let group = groups.of(GroupKey {
                label: Label::Cgroup(n.into()),
                ..key(port)
            });
            groups.joins(group);
            *members.entry(*groups.key(group)).or_default() += 1;
        }
        for port in 1..=3 {
            let of_port = members.iter().filter(|(key, _)| key.port == Some(port));
            let sum: u64 = of_port.map(|(_, n)| n).sum();
            assert_eq!(sum, if port == 1 { 334 } else { 333 });
        }
        assert!(members.len() <= 13);
    }
}
