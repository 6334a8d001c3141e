//! `/proc/net/tcp` and `/proc/net/tcp6`, where the kernel is not to be asked over netlink.
//!
//! They have no cookies, no scopes and no `TCP_INFO`. The kernel writes them a page at a time, and
//! what changes between two pages may cost a line: one that is missing is no proof by itself.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use crate::host::{Key, Read, Seen, Socket};

const FILES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];

/// A line has about 150 bytes; what is longer is no such file.
const LONGEST: u64 = 1024;

/// Every socket. The files' times to read grow with the sockets of the host.
pub(crate) fn read(mut each: impl FnMut(&Seen)) -> io::Result<()> {
    let mut found = false;
    let mut each = |socket: &Socket| {
        each(&Seen {
            key: socket.key,
            cookie: None,
            state: socket.state,
            held: socket.inode != 0,
            inode: socket.inode.into(),
            tcp: None,
        });
    };
    for file in FILES {
        // A host without IPv6 has no second one.
        match File::open(file) {
            Ok(file) => {
                read_file(reader(file), &mut each)?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound && found => {}
            Err(error) => return Err(error),
        }
        found = true;
    }
    Ok(())
}

/// Every socket in `tcp` and `tcp6` of this directory. An error is one before the first row; what
/// goes wrong later is in [`Read`].
pub(crate) fn scan(directory: &Path, mut each: impl FnMut(&Socket)) -> io::Result<Read> {
    let mut read = Read::default();
    for (first, name) in [(true, "tcp"), (false, "tcp6")] {
        let mut counted = |socket: &Socket| {
            read.rows += 1;
            each(socket);
        };
        let file = File::open(directory.join(name));
        match file.and_then(|file| read_file(reader(file), &mut counted)) {
            Ok(malformed) => read.malformed += malformed,
            Err(error) if error.kind() == ErrorKind::NotFound && !first => {}
            Err(error) if first && read.rows == 0 => return Err(error),
            Err(error) => read.torn = Some(error),
        }
    }
    Ok(read)
}

fn reader(file: File) -> BufReader<File> {
    BufReader::with_capacity(32 * 1024, file)
}

/// Gives back how many lines could not be read. The kernel's file has a heading, also where there is
/// no socket; what has none is another file.
pub(super) fn read_file(mut file: impl BufRead, each: &mut impl FnMut(&Socket)) -> io::Result<u64> {
    let mut line = Vec::new();
    let mut next = |line: &mut Vec<u8>| {
        line.clear();
        io::Read::take(&mut file, LONGEST).read_until(b'\n', line)
    };
    next(&mut line)?;
    if !line.trim_ascii_start().starts_with(b"sl ") {
        let text = "it does not begin as the kernel's table of TCP sockets does";
        return Err(io::Error::new(ErrorKind::InvalidData, text));
    }
    let mut malformed = 0;
    while next(&mut line)? > 0 {
        match std::str::from_utf8(&line).ok().and_then(parse) {
            Some(socket) => each(&socket),
            None => malformed += 1,
        }
    }
    Ok(malformed)
}

/// `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...`.
fn parse(line: &str) -> Option<Socket> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = end(fields.next()?)?;
    let peer = end(fields.next()?)?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    let (to_send, received) = fields.next()?.split_once(':')?;
    let queue = |text| u32::from_str_radix(text, 16).ok();
    let inode: u64 = fields.nth(4)?.parse().ok()?;
    Some(Socket {
        key: Key::new(local, peer, 0),
        cookie: 0,
        cgroup: 0,
        // The kernel counts them in 32 bits.
        inode: inode as u32,
        received: queue(received)?,
        to_send: queue(to_send)?,
        state,
    })
}

/// An address, word by word as the kernel has it in memory, and a port as people write it.
fn end(text: &str) -> Option<(Ipv6Addr, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip = match address.len() {
        8 => Ipv4Addr::from(word(0)?).to_ipv6_mapped(),
        32 => {
            let mut octets = [0; 16];
            for (at, four) in octets.chunks_exact_mut(4).enumerate() {
                four.copy_from_slice(&word(at * 8)?);
            }
            octets.into()
        }
        _ => return None,
    };
    Some((ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Tuple;
    use std::net::{TcpListener, TcpStream};

    #[test]
    #[cfg(target_endian = "little")]
    fn a_line_is_read_field_by_field() {
        let line = "   1: 0100007F:9EBB 0200A8C0:01BB 08 00000000:00000004 00:00000000 00000000     \
                    0        0 54805 5 0000000017381f3e 100 0 0 10 0";
        let tuple = Tuple {
            local: "127.0.0.1:40635".parse().unwrap(),
            peer: "192.168.0.2:443".parse().unwrap(),
        };
        let expected = Socket {
            key: Key::from(&tuple),
            cookie: 0,
            cgroup: 0,
            inode: 54805,
            received: 4,
            to_send: 0,
            state: 8,
        };
        assert_eq!(parse(line), Some(expected));
        let orphan = line.replace("54805", "0");
        assert_eq!(parse(&orphan).unwrap().inode, 0);
        for wrong in ["", "sl local_address", "1: 0100007F 0200A8C0:01BB 08"] {
            assert_eq!(parse(wrong), None);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_line_is_too_wild(line: String, bytes: Vec<u8>) {
            parse(&line);
            let near = format!("0: {line}:0 0:0 0 0:0 0 0 0 0 0");
            parse(&near);
            let mut file = b"  sl  local_address\n".to_vec();
            file.extend(bytes);
            read_file(&file[..], &mut |_| {}).unwrap();
        }
    }

    #[test]
    fn a_file_without_its_heading_is_no_table() {
        for file in [
            "",
            "\n",
            "nothing like it\n",
            "slow\n",
            "   1: 0100007F:9EBB",
        ] {
            let error = read_file(file.as_bytes(), &mut |_| {}).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{file:?}");
        }
        let empty = "  sl  local_address rem_address   st\n".as_bytes();
        assert_eq!(read_file(empty, &mut |_| {}).unwrap(), 0);
    }

    #[test]
    fn a_connection_of_ours_is_in_the_files_by_both_families() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                // A host without IPv6.
                assert!(address.starts_with('['));
                continue;
            };
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let key = Key::from(&Tuple {
                local: stream.local_addr().unwrap(),
                peer: stream.peer_addr().unwrap(),
            });
            let mut found = None;
            read(|seen| {
                if seen.key == key {
                    found = Some(*seen);
                }
            })
            .unwrap();
            assert!(found.is_some_and(|seen| seen.held && seen.state == 1));
        }
    }
}
