//! Queues with removal from the middle in constant time: linked lists whose links live in the
//! entries of a slab.
//!
//! A waiter that gives up, a connection that dies while idle: both leave from anywhere in their
//! queue, and both may be one of thousands. Nothing allocates but the slab.

// The transport's pool uses all of it, a limit for stock clients some.
#![cfg_attr(not(feature = "transport"), allow(dead_code))]

use slab::Slab;

const NONE: u32 = u32::MAX;

/// An entry's place in one list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    prev: u32,
    next: u32,
    on: bool,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            prev: NONE,
            next: NONE,
            on: false,
        }
    }
}

impl Link {
    /// Whether the entry is in the list that this link is for.
    pub(crate) const fn is_on(&self) -> bool {
        self.on
    }

    /// The entry before this one.
    pub(crate) fn prev(&self) -> Option<u32> {
        (self.prev != NONE).then_some(self.prev)
    }

    /// The entry after this one.
    pub(crate) fn next(&self) -> Option<u32> {
        (self.next != NONE).then_some(self.next)
    }
}

/// A list; `link` says which of an entry's links is its.
#[derive(Clone, Copy, Debug)]
pub(crate) struct List {
    head: u32,
    tail: u32,
    len: usize,
}

impl Default for List {
    fn default() -> Self {
        Self {
            head: NONE,
            tail: NONE,
            len: 0,
        }
    }
}

type LinkOf<T> = fn(&mut T) -> &mut Link;

impl List {
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) const fn front(&self) -> Option<u32> {
        if self.head == NONE {
            None
        } else {
            Some(self.head)
        }
    }

    pub(crate) const fn back(&self) -> Option<u32> {
        if self.tail == NONE {
            None
        } else {
            Some(self.tail)
        }
    }

    /// The entry after this one.
    pub(crate) fn after<T>(slab: &mut Slab<T>, at: u32, link: LinkOf<T>) -> Option<u32> {
        let next = link(&mut slab[at as usize]).next;
        (next != NONE).then_some(next)
    }

    pub(crate) fn push_back<T>(&mut self, slab: &mut Slab<T>, at: u32, link: LinkOf<T>) {
        let tail = self.tail;
        *link(&mut slab[at as usize]) = Link {
            prev: tail,
            next: NONE,
            on: true,
        };
        if tail == NONE {
            self.head = at;
        } else {
            link(&mut slab[tail as usize]).next = at;
        }
        self.tail = at;
        self.len += 1;
    }

    /// Takes an entry out; false if it was not in.
    pub(crate) fn remove<T>(&mut self, slab: &mut Slab<T>, at: u32, link: LinkOf<T>) -> bool {
        let Link { prev, next, on } = std::mem::take(link(&mut slab[at as usize]));
        if !on {
            return false;
        }
        if prev == NONE {
            self.head = next;
        } else {
            link(&mut slab[prev as usize]).next = next;
        }
        if next == NONE {
            self.tail = prev;
        } else {
            link(&mut slab[next as usize]).prev = prev;
        }
        self.len -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_leave_from_anywhere_and_the_rest_keeps_its_order() {
        let mut slab: Slab<(u32, Link)> = Slab::new();
        let mut list = List::default();
        let link: LinkOf<(u32, Link)> = |entry| &mut entry.1;
        let at: Vec<u32> = (0..5)
            .map(|n| slab.insert((n, Link::default())) as u32)
            .collect();
        for at in &at {
            list.push_back(&mut slab, *at, link);
        }
        assert!(list.remove(&mut slab, at[2], link));
        assert!(!list.remove(&mut slab, at[2], link));
        assert!(list.remove(&mut slab, at[0], link));
        assert!(list.remove(&mut slab, at[4], link));
        assert_eq!((list.front(), list.back()), (Some(at[1]), Some(at[3])));
        assert_eq!(List::after(&mut slab, at[1], link), Some(at[3]));
        list.push_back(&mut slab, at[0], link);
        assert_eq!((list.back(), list.len()), (Some(at[0]), 3));
        for at in [at[1], at[3], at[0]] {
            assert_eq!(list.front(), Some(at));
            list.remove(&mut slab, at, link);
        }
        assert!(list.is_empty() && list.back().is_none());
    }
}
