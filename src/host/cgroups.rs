//! The names of cgroups: what the kernel calls by numbers, people know by directories.
//!
//! A cgroup's number is that of its directory. So the tree is walked when an unknown number comes,
//! seldom, and within bounds; what is not found is shown by its number, and is no reason to walk again
//! for a while.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Directories that are looked at in one walk.
const MOST: usize = 20_000;
/// Between walks.
const PAUSE: Duration = Duration::from_secs(10);
/// Between walks for what the last one did not find: a cgroup of another container, say, whose
/// directory is not to be seen from here.
const LONG_PAUSE: Duration = Duration::from_secs(600);
/// So many that were not found are remembered.
const MISSING: usize = 10_000;

/// The names that are known.
#[derive(Debug, Default)]
pub(super) struct Cgroups {
    mount: Option<PathBuf>,
    names: HashMap<u64, Arc<str>>,
    /// Asked for since the last walk, which did not find them.
    missing: HashSet<u64>,
    walked: Option<Instant>,
}

impl Cgroups {
    /// The directory below the mount, as `/system.slice/nginx.service`; else the number.
    pub(super) fn name(&mut self, id: u64, now: Instant) -> Arc<str> {
        if id == 0 {
            return "unknown".into();
        }
        if !self.names.contains_key(&id) && self.is_time(id, now) {
            self.walk(now);
        }
        if let Some(name) = self.names.get(&id) {
            return name.clone();
        }
        // Those that came too soon after a walk are not missing yet.
        if self.walked == Some(now) && self.missing.len() < MISSING {
            self.missing.insert(id);
        }
        format!("cgroup:{id}").into()
    }

    fn is_time(&self, id: u64, now: Instant) -> bool {
        let pause = if self.missing.contains(&id) || self.missing.len() >= MISSING {
            LONG_PAUSE
        } else {
            PAUSE
        };
        self.walked.is_none_or(|at| now.duration_since(at) >= pause)
    }

    fn walk(&mut self, now: Instant) {
        self.walked = Some(now);
        self.missing.clear();
        if self.mount.is_none() {
            self.mount =
                mount(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default());
        }
        if let Some(mount) = &self.mount {
            // What is gone is forgotten.
            self.names = names(mount);
        }
    }
}

#[cfg(target_os = "linux")]
fn number(directory: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(std::fs::symlink_metadata(directory).ok()?.ino())
}

#[cfg(not(target_os = "linux"))]
fn number(_: &Path) -> Option<u64> {
    None
}

fn names(mount: &Path) -> HashMap<u64, Arc<str>> {
    let mut names = HashMap::new();
    let mut left = vec![mount.to_owned()];
    while let Some(directory) = left.pop() {
        if names.len() >= MOST {
            break;
        }
        let Some(id) = number(&directory) else {
            continue;
        };
        let below = directory
            .strip_prefix(mount)
            .unwrap_or_else(|_| Path::new(""));
        names.insert(id, format!("/{}", below.display()).into());
        let Ok(entries) = std::fs::read_dir(&directory) else {
            continue;
        };
        let directories = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        left.extend(directories.map(|entry| entry.path()).take(MOST));
    }
    names
}

/// Where cgroups of version 2 are: `... /sys/fs/cgroup ... - cgroup2 ...` (proc_pid_mountinfo(5)).
pub(super) fn mount(mountinfo: &str) -> Option<PathBuf> {
    let at = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let is = kind.split(' ').next() == Some("cgroup2");
        is.then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    };
    mountinfo.lines().find_map(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_among_others() {
        let text = "29 1 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                    30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                    31 29 0:28 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount(text), Some("/sys/fs/cgroup/unified".into()));
        for text in [
            "",
            "a - cgroup2",
            "1 2 3 4 - cgroup2 x",
            "1 2 3 4 5 - tmpfs",
        ] {
            assert_eq!(mount(text), None, "{text}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_directory_is_named_by_its_number_from_the_mount_on() {
        let root = std::env::temp_dir().join(format!("conntrack-cgroups-{}", std::process::id()));
        let service = root.join("system.slice/nginx.service");
        std::fs::create_dir_all(&service).unwrap();
        let known = names(&root);
        let name = |directory: &Path| &*known[&number(directory).unwrap()];
        assert_eq!(name(&root), "/");
        assert_eq!(name(&service), "/system.slice/nginx.service");
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn what_is_not_found_is_shown_by_its_number_and_seldom_looked_for() {
        let (mut cgroups, begun) = (Cgroups::default(), Instant::now());
        let mut ask = |id: u64, seconds: u64| {
            let now = begun + Duration::from_secs(seconds);
            let name = cgroups.name(id, now);
            (name, cgroups.walked == Some(now))
        };
        assert_eq!(ask(0, 0), ("unknown".into(), false));
        let (one, two) = (u64::MAX, u64::MAX - 1);
        assert_eq!(ask(one, 1), (format!("cgroup:{one}").into(), true));
        assert!(!ask(one, 12).1);
        // One that is new is worth a walk, once; too soon after the last it waits.
        assert!(!ask(two, 5).1);
        assert!(ask(two, 13).1);
        assert!(!ask(two, 40).1);
        // All that is asked for in a scan is known to be missing after its walk.
        assert!(ask(one, 41).1);
        ask(two, 41);
        assert!(!ask(one, 100).1 && !ask(two, 600).1);
        assert!(ask(one, 41 + 600).1);
    }
}
