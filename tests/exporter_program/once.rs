//! A table for people.

use super::*;

#[test]
fn a_table_for_people_is_printed_once() {
    let server = Server::start("127.0.0.1:0", 4).unwrap();
    let port = server.port();
    let output = ended(&["--once", "--duration", "0", "--port", &port], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let mut lines = text.lines();
    let heading: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(heading, ["PORT", "IP", "ESTABLISHED", ">=0s", "OLDEST"]);
    let row: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(row, ["in", &port, "ipv4", "4", "4", ">=0s"]);
    assert!(
        text.contains("4 established (ipv4)") && text.contains("rows by netlink"),
        "{text}"
    );
    // With a duration it watches for as long.
    let begun = Instant::now();
    let output = ended(&["--once", "--duration", "1", "--port", &port], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..5], ["in", &port, "ipv4", "4", "4"]);
}

/// A table that is there for one look: a pipe says when that was.
#[test]
fn a_table_is_printed_though_later_looks_failed() {
    let root = std::env::temp_dir().join(format!("conntrack-exporter-once-{}", std::process::id()));
    let table = root.join("net/tcp");
    std::fs::create_dir_all(table.parent().unwrap()).unwrap();
    let arguments = [
        "--once",
        "--duration",
        "1",
        "--period",
        "0.1",
        "--proc-root",
    ];
    let arguments = [&arguments[..], &[root.to_str().unwrap()]].concat();
    // None at all: that is an error.
    let output = ended(&arguments, &[]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        output.stdout.is_empty() && said.contains("--proc-root"),
        "{said}"
    );

    assert!(
        Command::new("mkfifo")
            .arg(&table)
            .status()
            .unwrap()
            .success()
    );
    let child = program::command(&arguments, &[])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Waits for the one who reads.
    let mut pipe = std::fs::OpenOptions::new()
        .write(true)
        .open(&table)
        .unwrap();
    std::fs::remove_file(&table).unwrap();
    let text = "  sl  local_address\n\
        1: 0100007F:0050 0100007F:03E8 01 00000000:00000000 00:00000000 00000000 0 0 2\n";
    std::io::Write::write_all(&mut pipe, text.as_bytes()).unwrap();
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    let [out, said] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{said}");
    let row: Vec<_> = out
        .lines()
        .nth(1)
        .unwrap()
        .split_whitespace()
        .take(4)
        .collect();
    assert_eq!(row[2..], ["ipv4", "1"], "{out}");
    assert!(
        said.contains("looks at the table failed") && said.contains(" s ago"),
        "{said}"
    );
    std::fs::remove_dir_all(root).unwrap();
}

#[test]
fn a_signal_ends_the_watch_for_a_table_at_once() {
    use std::os::unix::process::ExitStatusExt;
    let arguments = ["--once", "--duration", "600"];
    for (signal, number) in [("TERM", 15), ("INT", 2)] {
        let mut child = program::command(&arguments, &[]).spawn().unwrap();
        let kill = format!("kill -{signal} {}", child.id());
        assert!(
            Command::new("sh")
                .args(["-c", &kill])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(child.wait().unwrap().signal(), Some(number));
    }
    // The first process of a container, which signals don't end by themselves.
    let unshare = ["-rpf", "--kill-child"];
    let may = Command::new("unshare").args(unshare).arg("true").output();
    if !may.is_ok_and(|output| output.status.success()) {
        eprintln!("unshare is not allowed here, so there was no first process");
        return;
    }
    let mut command = Command::new("unshare");
    command
        .args(unshare)
        .arg(env!("CARGO_BIN_EXE_conntrack-exporter"));
    let mut child = command.args(arguments).env_clear().spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let end = Instant::now() + BOUND;
    let status = loop {
        // Until it hears: it may not have begun.
        let first = std::fs::read_to_string(&children).unwrap_or_default();
        if !first.trim().is_empty() {
            let kill = format!("kill -TERM {first}");
            let _ = Command::new("sh").args(["-c", &kill]).status();
        }
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < end, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(128 + 15));
}
