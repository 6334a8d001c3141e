//! What browsers and other clients get, and what they can't do.

use super::*;

/// A load balancer's spare connections, or somebody who means harm.
#[test]
fn silent_clients_hold_up_neither_a_scrape_nor_the_health() {
    let exporter = Exporter::start(&["--duration", "0"]);
    let connect = || TcpStream::connect(exporter.address).unwrap();
    let _silent: Vec<_> = (0..50).map(|_| connect()).collect();
    let begun = Instant::now();
    for path in ["/-/healthy", "/metrics", "/"] {
        assert_eq!(exporter.get(path).0, 200);
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn the_page_has_every_setting_its_origin_and_no_markup_of_others() {
    let file = File::new("<b>&'.conf", "# ours\nport 1-65535\nduration=7\nsimple\n");
    let listen = ("LISTEN", "127.0.0.1:0");
    let arguments = ["--conf", file.path(), "--duration", "8"];
    let exporter = Exporter::start_with(&arguments, &[listen, ("SIMPLE", "false")]);
    let (status, head, page) = exporter.get("/");
    assert_eq!(status, 200);
    assert!(head.contains("text/html"), "{head}");
    let row = |name: &str| {
        let begin = format!("<tr><td>{name}</td>");
        let line = page.lines().find(|line| line.starts_with(&begin)).unwrap();
        line.replace("<tr>", "")
            .replace("</tr>", "")
            .replace("<td>", "|")
            .replace("</td>", "")
    };
    let path = file
        .path()
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    let path = path.replace('\'', "&#39;");
    assert_eq!(row("duration"), "|duration|8||flag --duration");
    assert_eq!(row("simple"), "|simple|false||environment variable SIMPLE");
    assert_eq!(row("port"), format!("|port|1-65535|1-65535|{path}:2"));
    assert_eq!(row("tcpv6"), "|tcpv6|true||default");
    assert_eq!(row("config"), format!("|config|{path}||flag --config"));
    assert_eq!(
        row("listen"),
        format!(
            "|listen|127.0.0.1:0|{}|environment variable LISTEN",
            exporter.address
        )
    );
    assert!(!page.contains("<b>"), "{page}");
    let (status, _, text) = exporter.get("/-/healthy");
    assert_eq!((status, &*text), (200, "healthy\n"));
    assert_eq!(exporter.get("/nothing").0, 404);
    let (status, head, _) = request(exporter.address, "POST /metrics HTTP/1.1");
    assert!(
        status == 405 && head.to_lowercase().contains("allow: get, head"),
        "{head}"
    );
    let (status, _, body) = request(exporter.address, "HEAD /metrics HTTP/1.1");
    assert_eq!((status, &*body), (200, ""));
}

/// Not even a directory's name that means harm, said in a file of such a name; nor why it can't be read.
#[test]
fn no_value_of_a_file_becomes_markup() {
    let harm = "<img src=x onerror=alert(1)>&amp;\"'";
    let root = std::env::temp_dir().join(format!("conntrack-{}-{harm}", std::process::id()));
    let table = root.join("net/tcp");
    std::fs::create_dir_all(table.parent().unwrap()).unwrap();
    std::fs::write(&table, "  sl  local_address\n").unwrap();
    let text = format!("proc-root {}\nlisten=0\nperiod 0.1\n", root.display());
    let file = File::new("<script>'.conf", &text);
    let exporter = Exporter::start_with(&["--config", file.path()], &[("TCPV6", "true")]);
    let page = exporter.get("/").2;
    assert!(
        page.contains("&lt;img src=x onerror=alert(1)&gt;&amp;amp;&quot;&#39;"),
        "{page}"
    );
    std::fs::remove_file(&table).unwrap();
    let page = exporter.until("a failure", |_| {
        let page = exporter.get("/").2;
        page.contains("The last scan failed").then_some(page)
    });
    assert!(
        !page.contains("<img") && !page.contains("<script>"),
        "{page}"
    );
    std::fs::remove_dir_all(root).unwrap();
    // A value that can't be used gets no further than the terminal, on one line.
    let file = File::new("markup.conf", "allow-host <b>\u{1b}[31m\n");
    let said = String::from_utf8(ended(&["--conf", file.path()], &[]).stderr).unwrap();
    assert!(said.contains("<b>") && !said.contains('\u{1b}'), "{said}");
}

/// DNS rebinding: a web site whose name comes to mean 127.0.0.1 reads what is served there.
#[test]
fn on_the_loopback_it_answers_only_to_names_that_are_its_own() {
    let exporter = Exporter::start(&["--allow-host", "Ops.example,node1"]);
    let ask = |headers: &str| request_with(exporter.address, "GET /metrics HTTP/1.1", headers);
    for host in [
        "127.0.0.1:9690",
        "[::1]",
        "localhost:1",
        "a.localhost",
        "ops.example",
        "NODE1:80",
    ] {
        assert_eq!(ask(&format!("Host: {host}\r\n")).0, 200, "{host}");
    }
    for path in ["/", "/metrics", "/-/healthy", "/nothing"] {
        let line = format!("GET {path} HTTP/1.1");
        let host = "Host: evil.example\r\n";
        let (status, _, text) = request_with(exporter.address, &line, host);
        assert!(
            status == 421 && text.contains("--allow-host"),
            "{status} {text}"
        );
    }
    assert_eq!(ask("Host: localhost\r\nHost: evil.example\r\n").0, 400);
    // A load balancer's check, which no browser sends.
    let (status, _, _) = request_with(exporter.address, "GET /-/healthy HTTP/1.0", "");
    assert_eq!(status, 200);
    // Who listens for others is asked under whatever name they know it by, unless told its names.
    let name = "Host: exporter.monitoring.svc:9690\r\n";
    for (arguments, status) in [
        (&["--listen", "0.0.0.0:0"][..], 200),
        (&["--listen", "0.0.0.0:0", "--allow-host", "x"], 421),
    ] {
        let exporter = Exporter::start(arguments);
        let address = ([127, 0, 0, 1], exporter.address.port()).into();
        assert_eq!(
            request_with(address, "GET /metrics HTTP/1.1", name).0,
            status
        );
    }
}

#[test]
fn a_browser_may_do_nothing_with_an_answer_but_show_it() {
    let exporter = Exporter::start(&[]);
    for path in ["/", "/metrics", "/-/healthy", "/nothing"] {
        let (_, head, page) = exporter.get(path);
        let head = head.to_lowercase();
        for word in [
            "x-content-type-options: nosniff",
            "cache-control: no-store",
            "default-src 'none'",
            "frame-ancestors 'none'",
        ] {
            assert!(head.contains(word), "{word} is not in {head}");
        }
        // The one style that there is may be used.
        if let Some((_, rest)) = page.split_once("<style>") {
            let (style, rest) = rest.split_once("</style>").unwrap();
            let policy = format!("style-src 'sha256-{}'", sha256(style)).to_lowercase();
            assert!(head.contains(&policy), "{policy} is not in {head}");
            assert!(!rest.contains("<style") && !page.contains("style="));
        }
    }
    assert!(exporter.get("/").2.contains("<style>"));
}

/// In base 64.
fn sha256(text: &str) -> String {
    let suite = rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let hash = suite
        .tls13()
        .unwrap()
        .common
        .hash_provider
        .hash(text.as_bytes());
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for three in hash.as_ref().chunks(3) {
        let bits = three.iter().chain(&[0, 0]).take(3);
        let bits = bits.fold(0, |all, byte| all << 8 | usize::from(*byte));
        for digit in 0..4 {
            let digit = DIGITS[bits >> (18 - 6 * digit) & 63] as char;
            out.push(digit);
        }
    }
    out.truncate(hash.as_ref().len().div_ceil(3) * 4 - 1);
    out + "="
}
