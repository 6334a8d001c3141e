//! Where the rows come from: netlink, else `/proc`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{ESTABLISHED, Feed, LISTEN, MonitorBuilder, Read, Socket, Source};
use crate::host::sock_diag::{Netlink, PART, Query};
use crate::host::{proc_tcp, sock_diag};

/// Listening sockets, which are few and stand in a table of their own; and the rest that is in the
/// table of connections.
const LISTENING: u32 = 1 << LISTEN;
const OTHERS: u32 = 1 << ESTABLISHED | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 8 | sock_diag::CLOSING;

/// Where the kernel does not let itself be asked, it is tried again after this time.
pub(super) const RETRY: Duration = Duration::from_secs(30);

pub(super) struct Reader {
    netlink: bool,
    pub(super) refused: Option<Instant>,
    pub(super) query: Query,
    /// The kernel's filter.
    program: Vec<u8>,
    buffer: Vec<u8>,
    pub(super) net: PathBuf,
    /// The inodes of this process's sockets, where they are left out.
    own: Option<Vec<u32>>,
}

impl Reader {
    #[allow(clippy::unnecessary_wraps)] // elsewhere it can't be
    pub(super) fn new(settings: &MonitorBuilder, program: Vec<u8>) -> io::Result<Self> {
        Ok(Self {
            netlink: settings.netlink && settings.proc_root.is_none(),
            refused: None,
            query: Query::to(Box::<Netlink>::default()),
            program,
            buffer: Vec::new(),
            net: settings.net(),
            own: settings.leave_out_self.then(Vec::new),
        })
    }

    pub(super) fn net(&self) -> &Path {
        &self.net
    }

    pub(super) fn read(&mut self, feed: &mut Feed<'_>) -> io::Result<(Source, Read)> {
        feed.begin();
        if let Some(own) = &mut self.own {
            own_sockets(own);
            own.sort_unstable();
        }
        let own = self.own.take();
        let is_own = |socket: &Socket| {
            let is = |own: &Vec<u32>| socket.inode != 0 && own.binary_search(&socket.inode).is_ok();
            own.as_ref().is_some_and(is)
        };
        let mut each = |socket: &Socket| {
            if !is_own(socket) {
                feed.row(socket);
            }
        };
        let asks = self.netlink && self.refused.is_none_or(|at| at.elapsed() >= RETRY);
        let mut answer = if asks {
            self.ask(&mut each).map(|read| (Source::Netlink, read))
        } else {
            Err(io::ErrorKind::Unsupported.into())
        };
        if let Err(why) = answer {
            // A kernel that was busy is asked at the next scan.
            if asks && sock_diag::is_refused(&why) {
                self.refused = Some(Instant::now());
            }
            feed.begin();
            let each = |socket: &Socket| {
                if !is_own(socket) {
                    feed.row(socket);
                }
            };
            answer = match proc_tcp::scan(&self.net, each) {
                Ok(read) => Ok((Source::Proc, read)),
                Err(error) => {
                    let file = self.net.join("tcp");
                    let netlink = if asks {
                        format!("; netlink: {why}")
                    } else {
                        String::new()
                    };
                    let text = format!("{}: {error}{netlink}", file.display());
                    // Asked again at once the next time: there is nothing else.
                    self.refused = None;
                    Err(io::Error::new(error.kind(), text))
                }
            };
        }
        self.own = own;
        answer
    }

    /// The sockets of this process, where they are left out and there are others than before the table
    /// was read: one that was opened meanwhile may be in it.
    pub(super) fn own_since(&mut self) -> Option<&[u32]> {
        let own = self.own.as_mut()?;
        let before = std::mem::take(own);
        own_sockets(own);
        (*own != before).then_some(own)
    }

    fn ask(&mut self, each: &mut impl FnMut(&Socket)) -> io::Result<Read> {
        self.buffer.resize(PART, 0);
        // First, for directions. All of them: a filter is for connections.
        let (query, buffer) = (&mut self.query, &mut self.buffer);
        let listening = query.scan(LISTENING, &[], buffer, &mut *each)?;
        let others = query.scan(OTHERS, &self.program, buffer, each)?;
        self.refused = None;
        let torn = listening.torn.or(others.torn);
        Ok(Read {
            rows: listening.rows + others.rows,
            malformed: listening.malformed + others.malformed,
            torn,
        })
    }
}

/// Of `/proc/self/fd`: what is `socket:[inode]`. What can't be read is not left out.
fn own_sockets(own: &mut Vec<u32>) {
    own.clear();
    let Ok(files) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    own.extend(files.flatten().filter_map(|file| {
        let target = std::fs::read_link(file.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?;
        inode.strip_suffix(']')?.parse::<u32>().ok()
    }));
}
