//! How it begins, how it ends, and what it refuses.

use super::*;

/// Bug 8 of the seed: the port was another than it said, and `--conf` was no flag.
#[test]
fn the_default_is_9690_on_the_loopback_and_help_says_so() {
    let help = ended(&["--help"], &[]);
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(help.status.success());
    for word in [
        "[default: 9690] [env: LISTEN]",
        "--conf",
        "--simple",
        "127.0.0.1",
        "[env: GROUP_BY]",
    ] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
}

/// Bug 9 of the seed: it ended silently, with 0.
#[test]
fn an_address_in_use_is_an_error_that_says_so() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (arguments, variables, origin) in [
        (&["--listen", &*address][..], &[][..], "flag --listen"),
        (&[], &[("LISTEN", &*address)], "environment variable LISTEN"),
    ] {
        let output = ended(arguments, variables);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        for word in [origin, &*address, "in use", "give another"] {
            assert!(said.contains(word), "{said}");
        }
    }
    // An address that is not this host's.
    let output = ended(&["--listen", "192.0.2.1:1"], &[]);
    assert_eq!(output.status.code(), Some(1));
}

/// Who reads its words may go: it serves and ends as ever.
#[test]
fn it_goes_on_though_nobody_hears_it() {
    let mut exporter = Exporter::start(&[]);
    exporter.mute();
    exporter.scrape();
    exporter.signal("TERM");
    assert!(exporter.wait().0.success());
}

#[test]
fn what_is_not_understood_is_exit_code_2_and_named() {
    let file = File::new("unknown.conf", "simple\nnothing 1\n");
    let in_file = format!("{}:2", file.path());
    for (arguments, variables, words) in [
        (&["--nothing"][..], &[][..], ["--nothing", "Usage"]),
        (
            &["--simple=2"],
            &[],
            ["simple (flag --simple)", "true or false"],
        ),
        (&["--otlp", "http://x"], &[], ["write --otlp=URL", "Usage"]),
        (
            &["--port", "70000"],
            &[],
            ["port (flag --port)", "1 to 65535"],
        ),
        (
            &[],
            &[("PORT", "x y")],
            ["environment variable PORT", "/etc/services"],
        ),
        (
            &[],
            &[("DURATION", "soon")],
            ["environment variable DURATION", "whole seconds"],
        ),
        (
            &["--config", file.path()],
            &[],
            [&in_file, "no such setting"],
        ),
        (
            &["--config", "/nothing"],
            &[],
            ["flag --config", "/nothing"],
        ),
        (&["--otlp=ftp://x"], &[], ["otlp", "http"]),
        (
            &[],
            &[("RUST_LOG", "a=b=c")],
            ["RUST_LOG", "otel_conntrack=debug"],
        ),
        (
            &["--otlp"],
            &[("OTEL_METRIC_EXPORT_INTERVAL", "x")],
            ["OTEL_METRIC_EXPORT_INTERVAL", "x"],
        ),
    ] {
        let output = ended(arguments, variables);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?} {variables:?}: {said}"
        );
        for word in words {
            assert!(said.contains(word), "{word} is not in {said}");
        }
    }
}

#[test]
fn it_stops_when_it_is_told_to_also_while_somebody_is_connected() {
    for signal in ["TERM", "INT"] {
        let exporter = Exporter::start(&[]);
        // One that says nothing, and one between two requests.
        let _silent = TcpStream::connect(exporter.address).unwrap();
        let mut idle = TcpStream::connect(exporter.address).unwrap();
        std::io::Write::write_all(
            &mut idle,
            b"GET /-/healthy HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        )
        .unwrap();
        let mut answer = [0; 12];
        std::io::Read::read_exact(&mut idle, &mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        exporter.signal(signal);
        let begun = Instant::now();
        let address = exporter.address;
        let (status, said) = exporter.wait();
        assert!(
            status.success() && said.ends_with("stopped"),
            "{status}: {said}"
        );
        assert!(begun.elapsed() < Duration::from_secs(10));
        // The address is free again.
        drop(TcpListener::bind(address).unwrap());
    }
}
