//! The files that come with it, and what it prints of itself.

use super::*;

#[test]
fn the_example_of_a_file_is_one() {
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/examples/deploy/conntrack-exporter.conf"
    );
    let output = ended(&["--once", "--config", file, "--duration", "0"], &[]);
    assert!(output.status.success(), "{output:?}");
    // And what is a comment there is a setting too.
    let text = std::fs::read_to_string(file).unwrap();
    let is_setting = |line: &&str| {
        let line = line.strip_prefix("# ").unwrap_or_default();
        [
            "simple",
            "port 443,8080-8090,https",
            "listen 0.0.0.0:9690",
            "allow-host exporter.internal,node1",
            "rows 1000",
            "limit 2000000",
        ]
        .contains(&line)
    };
    let all = text
        .lines()
        .filter(is_setting)
        .map(|line| &line[2..])
        .collect::<Vec<_>>();
    assert_eq!(all.len(), 6, "{text}");
    let file = File::new("all.conf", &all.join("\n"));
    let output = ended(&["--once", "--conf", file.path(), "--duration", "0"], &[]);
    assert!(output.status.success(), "{output:?}");
}

/// The manifest's flags and variables are the program's; and what is built is the same everywhere.
#[test]
fn the_files_for_containers_and_services_are_the_programs() {
    let read = |name: &str| {
        let path = format!("{}/examples/deploy/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    };
    let sidecar = read("sidecar.yaml");
    let (_, list) = sidecar.split_once("args: [").unwrap();
    let (list, _) = list.split_once(']').unwrap();
    let arguments: Vec<_> = list
        .split(',')
        .map(|one| one.trim().trim_matches('"'))
        .collect();
    assert!(arguments.contains(&"--port=3838"), "{list}");
    let (_, listen) = sidecar.split_once("name: LISTEN, value: \"").unwrap();
    let (listen, _) = listen.split_once('"').unwrap();
    let all = [&arguments[..], &["--once", "--duration", "0"]].concat();
    let output = ended(&all, &[("LISTEN", listen)]);
    assert!(output.status.success(), "{output:?}");
    let built = "--no-default-features --features exporter,otlp-tls";
    for name in ["Containerfile", "conntrack-exporter.service"] {
        assert!(read(name).contains(built), "{name}");
    }
}

/// What a sidecar listens on: one socket for both families.
#[test]
fn an_address_of_ipv6_for_all_is_one_of_ipv4_too() {
    if TcpListener::bind("[::1]:0").is_err() {
        eprintln!("this host has no IPv6");
        return;
    }
    let exporter = Exporter::start(&["--listen", "[::]:0"]);
    let port = exporter.address.port();
    for address in ["127.0.0.1", "::1"] {
        let address = (address.parse::<std::net::IpAddr>().unwrap(), port).into();
        assert_eq!(
            request(address, "GET /metrics HTTP/1.1").0,
            200,
            "{address}"
        );
    }
}

#[test]
fn documents_come_from_the_program() {
    let text = |arguments: &[&str]| {
        let output = ended(arguments, &[]);
        assert!(output.status.success(), "{arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(text(&["--completions", "bash"]).contains("conntrack-exporter"));
    assert!(text(&["--man"]).contains(".TH"));
    assert_eq!(
        text(&["--version"]).trim(),
        concat!("conntrack-exporter ", env!("CARGO_PKG_VERSION"))
    );
}
