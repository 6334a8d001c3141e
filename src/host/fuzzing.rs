//! What the fuzz targets call: the parsers of what others wrote. Only there with `--cfg fuzzing`.

use super::netlink::{Message, Messages};
use super::ports::{Ports, find_service};
use super::{counters, proc_tcp};

/// A datagram of the kernel.
pub fn netlink(bytes: &[u8]) {
    let mut messages = Messages::new(bytes);
    let mut rows = 0;
    for message in messages.by_ref() {
        if let Message::Socket(_, row) = message {
            let (socket, seen) = (row.socket(), row.seen());
            assert_eq!(socket.key, seen.key);
            assert_eq!(Some(socket.cookie), seen.cookie);
            rows += 1;
        }
    }
    let _ = messages.torn();
    // Each takes a header and a row.
    assert!(rows * 88 <= bytes.len());
}

/// `/proc/net/tcp`, below its heading: every line is a row, or counted.
pub fn proc_tcp(bytes: &[u8]) {
    let _ = proc_tcp::read_file(bytes, &mut |_| {});
    let mut rows = 0_u64;
    let file = [b"  sl  local_address\n", bytes].concat();
    let malformed = proc_tcp::read_file(&file[..], &mut |_| rows += 1).expect("it has a heading");
    let lines = bytes.split(|byte| *byte == b'\n').count() as u64;
    // A line that is too long is several.
    assert!(rows + malformed <= lines + bytes.len() as u64 / 1_024 + 1);
}

/// What people write, and the files of `/proc` and `/etc` that are read for it.
pub fn text(text: &str) {
    if let Ok(ports) = Ports::parse("ports", text, |name| find_service(text, name)) {
        let again = ports
            .to_string()
            .parse::<Ports>()
            .expect("it is shown as it is read");
        assert_eq!(again, ports);
        assert_eq!(ports.program().is_empty(), ports.is_all());
    }
    if let Ok(group_by) = text.parse::<super::GroupBy>() {
        assert_eq!(
            group_by.to_string().parse::<super::GroupBy>().ok(),
            Some(group_by)
        );
    }
    let _ = counters::find(text, "Tcp:", "OutSegs");
    let _ = super::cgroups::mount(text);
}

/// The exporter's config file.
#[cfg(feature = "exporter")]
pub fn config(text: &str) {
    super::exporter::fuzz_config(text);
}
