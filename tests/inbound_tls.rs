//! A server's TLS as it is set up: what can't be used says which setting, which file and what to do,
//! and no byte of a file.
#![allow(
    clippy::unwrap_used,
    reason = "a test tells by a panic what went wrong"
)]
#![cfg(all(feature = "server", feature = "tls"))]

#[path = "support/refusal.rs"]
mod refusal;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use otel_conntrack::{ConfigError, ServerTls, ServerTlsBuilder, enable_http2, server_config};
use rcgen::{CertificateParams, KeyPair};
use refusal::{SECRET, assert_error};
use rustls::ServerConfig;
use rustls::server::ResolvesServerCertUsingSni;

/// A directory that goes with its test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let name = format!("otel-conntrack-inbound-tls-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, text: impl AsRef<[u8]>) -> String {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Certificate and key, as PEM.
fn made() -> (String, String) {
    let key = KeyPair::generate().unwrap();
    (certificate(&key), key.serialize_pem())
}

fn certificate(key: &KeyPair) -> String {
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.self_signed(key).unwrap().pem()
}

/// Key and certificate in one text.
fn pem(key: &KeyPair) -> String {
    key.serialize_pem() + &certificate(key)
}

#[track_caller]
fn refused(builder: ServerTlsBuilder) -> ConfigError {
    builder.build().expect_err("this was taken")
}

// === files ===

#[test]
fn a_bad_certificate_file_is_named_and_says_what_it_lacks() {
    let dir = Dir::new();
    let (cert, key) = made();
    let key = dir.file("tls.key", key);
    let missing = dir.0.join("missing").display().to_string();
    let directory = dir.0.display().to_string();
    let garbage = "-----BEGIN CERTIFICATE-----\nczNjcmV0\n-----END CERTIFICATE-----\n";
    for (path, way_out) in [
        (missing, "that this process may read"),
        (directory, "that this process may read"),
        (dir.file("empty", ""), "no certificate is in it"),
        (dir.file("text", SECRET), "no certificate is in it"),
        (dir.file("der", [0x30, 0x82]), "no certificate is in it"),
        (dir.file("cut", &cert[..cert.len() / 2]), "cut off"),
        (
            dir.file("dash", format!("-----BEGIN {SECRET}\n")),
            "malformed",
        ),
        (dir.file("b64", cert.replace("MII", "!!!")), "not base64"),
        (dir.file("der-in-pem", garbage), "can't be read"),
        (
            dir.file("large", vec![b'\n'; 4 * 1024 * 1024 + 1]),
            "more than 4 MiB",
        ),
    ] {
        let expected = ("tls cert_file", &*path, way_out);
        assert_error(&refused(ServerTls::builder(&path, &key)), expected);
        assert_error(&server_config(&path, &key).unwrap_err(), expected);
    }
}

#[test]
fn a_bad_key_file_is_named_and_no_byte_of_it_is_shown() {
    let dir = Dir::new();
    let (cert, key) = made();
    let cert = dir.file("tls.crt", cert);
    let not_a_key = "-----BEGIN PRIVATE KEY-----\nczNjcmV0\n-----END PRIVATE KEY-----\n";
    for (path, way_out) in [
        (cert.clone(), "no private key is in it"),
        (dir.file("empty", ""), "no private key is in it"),
        (dir.file("cut", &key[..key.len() / 2]), "cut off"),
        (
            dir.file("one-line", format!("-----BEGIN PRIVATE KEY-----{SECRET}")),
            "a line of its own",
        ),
        (
            dir.file("b64", key.replace('\n', &format!("\n!{SECRET}!\n"))),
            "not base64",
        ),
        (
            dir.file(
                "pkcs8-encrypted",
                key.replace("PRIVATE", "ENCRYPTED PRIVATE"),
            ),
            "openssl pkey",
        ),
        (
            dir.file(
                "old-encrypted",
                "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n\
                 czNjcmV0\n-----END RSA PRIVATE KEY-----\n",
            ),
            "openssl pkey",
        ),
        (dir.file("not-a-key", not_a_key), "Ed25519"),
        (dir.file("other", made().1), "not the key of the first"),
    ] {
        let expected = ("tls key_file", &*path, way_out);
        assert_error(&refused(ServerTls::builder(&cert, &path)), expected);
        assert_error(&server_config(&cert, &path).unwrap_err(), expected);
    }
}

#[test]
fn a_bad_file_of_client_authorities_is_named_by_the_setting_it_came_with() {
    let dir = Dir::new();
    let (cert, key) = made();
    let (cert, key) = (dir.file("tls.crt", cert), dir.file("tls.key", key));
    let garbage = "-----BEGIN CERTIFICATE-----\nczNjcmV0\n-----END CERTIFICATE-----\n";
    for (path, way_out) in [
        ("/no/such".to_owned(), "that this process may read"),
        (key.clone(), "no certificate is in it"),
        (dir.file("garbage", garbage), "can't be an authority"),
    ] {
        let builder = || ServerTls::builder(&cert, &key);
        let error = refused(builder().client_ca(&path));
        assert_error(&error, ("tls client_ca", &path, way_out));
        let error = refused(builder().client_ca_optional(&path));
        assert_error(&error, ("tls client_ca_optional", &path, way_out));
    }
}

#[test]
fn keys_of_every_usual_make_are_taken() {
    let dir = Dir::new();
    let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let ecdsa = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    for (name, pem) in [
        ("pkcs8-ed25519", pem(&ed25519)),
        ("pkcs8-ecdsa", pem(&ecdsa)),
        ("pkcs1-rsa", PKCS1.to_owned()),
        ("sec1-ecdsa", SEC1.to_owned()),
    ] {
        // Both in one file, and each for itself.
        let both = dir.file(name, &pem);
        server_config(&both, &both).unwrap();
        let at = pem.find("-----BEGIN CERTIFICATE").unwrap();
        let key = dir.file("key", &pem[..at]);
        let cert = dir.file("cert", &pem[at..]);
        let tls = ServerTls::builder(cert, key).build().unwrap();
        assert!(!tls.reload().unwrap(), "{name}");
    }
}

// === settings ===

#[test]
fn a_bound_of_nothing_is_refused_before_any_file_is_read() {
    let builder = || ServerTls::builder("/no/such", "/no/such");
    for (builder, expected) in [
        (
            builder().handshake_timeout(Duration::ZERO),
            ("tls handshake_timeout", "0ns", "give the time"),
        ),
        (
            builder().max_handshakes(0),
            ("tls max_handshakes", "0", "at least 1"),
        ),
        (
            builder().max_handshakes(usize::MAX),
            ("tls max_handshakes", &usize::MAX.to_string(), "at most"),
        ),
        (
            builder().reload_every(Duration::ZERO),
            ("tls reload_every", "0ns", "no_reload()"),
        ),
        (
            builder().alpn([""; 0]),
            ("tls alpn", "", "name one protocol at least"),
        ),
        (
            builder().alpn(["h2", ""]),
            ("tls alpn", "", "1 to 255 bytes"),
        ),
        (
            builder().alpn(["x".repeat(256)]),
            ("tls alpn", &"x".repeat(200), "1 to 255 bytes"),
        ),
    ] {
        assert_error(&refused(builder), expected);
    }
}

#[test]
fn the_edges_are_taken() {
    let dir = Dir::new();
    let (cert, key) = made();
    let (cert, key) = (dir.file("tls.crt", cert), dir.file("tls.key", key));
    let longest = "x".repeat(255);
    for builder in [
        ServerTls::builder(&cert, &key).alpn([&longest]),
        ServerTls::builder(&cert, &key).max_handshakes(1),
        ServerTls::builder(&cert, &key).handshake_timeout(Duration::MAX),
        ServerTls::builder(&cert, &key).reload_every(Duration::MAX),
        ServerTls::builder(&cert, &key).no_reload(),
        ServerTls::builder(&cert, &key).client_ca(&cert),
    ] {
        let tls = builder.build().unwrap();
        assert_eq!((tls.reload_errors(), tls.last_reload_error()), (0, None));
    }
}

// === configurations to start from ===

fn config(alpn: &[&str]) -> ServerConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
    config.alpn_protocols = alpn.iter().map(|alpn| alpn.as_bytes().to_vec()).collect();
    config
}

#[test]
fn http2_comes_first_once_and_takes_nothing_away_but_its_draft() {
    for (before, after) in [
        (&[][..], &["h2", "http/1.1"][..]),
        (&["http/1.1"], &["h2", "http/1.1"]),
        (&["h2"], &["h2"]),
        (
            &["http/1.1", "h2", "http/1.0"],
            &["h2", "http/1.1", "http/1.0"],
        ),
        (&["h2", "h2-14", "http/1.1", "h2"], &["h2", "http/1.1"]),
        (&["acme-tls/1", "acme-tls/1"], &["h2", "acme-tls/1"]),
    ] {
        let mut enabled = config(before);
        for _ in 0..3 {
            enabled = enable_http2(enabled);
            let alpn: Vec<_> = enabled
                .alpn_protocols
                .iter()
                .map(|alpn| std::str::from_utf8(alpn).unwrap())
                .collect();
            assert_eq!(alpn, after, "of {before:?}");
        }
    }
}

#[test]
fn a_configuration_from_files_has_no_alpn_and_needs_no_default_provider() {
    let dir = Dir::new();
    let (cert, key) = made();
    let (cert, key) = (dir.file("tls.crt", cert), dir.file("tls.key", key));
    let config = server_config(cert, key).unwrap();
    assert!(config.alpn_protocols.is_empty());
    let config = enable_http2(config);
    assert_eq!(config.alpn_protocols, [&b"h2"[..], b"http/1.1"]);
    ServerTls::from_config(Arc::new(config));
    assert!(rustls::crypto::CryptoProvider::get_default().is_none());
}

// === made once by `openssl req -x509`, for what rcgen does not make; they protect nothing ===

const SEC1: &str = "\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIL5eXmljWJXGoOzPWKK2i5Lgk22zQZSQTJHff+Gla+nRoAoGCCqGSM49
AwEHoUQDQgAEfenS0EO6jEmLIHZsMfF8cXR+naNFZExbIjh2emOUSWIhnLBKsQBp
4JMhOvmNOB596brXzW5EZPrGIxxkYGbzUg==
-----END EC PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBfjCCASWgAwIBAgIUDBmVJONXH4paMr3lv9Z6N2KxmycwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTE2MjgxN1oYDzIxMjYxMDI4
MTYyODE3WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR96dLQQ7qMSYsgdmwx8XxxdH6do0VkTFsiOHZ6Y5RJYiGcsEqxAGng
kyE6+Y04Hn3putfNbkRk+sYjHGRgZvNSo1MwUTAdBgNVHQ4EFgQUNyWg32/Wh4vA
Hacf121t0rjxtl4wHwYDVR0jBBgwFoAUNyWg32/Wh4vAHacf121t0rjxtl4wDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNHADBEAiACT73dWcJgtH3Fw16b5W9H
Ybh7S9kf1bEkJsfAMhHiGgIgVKH/jAtgjMM/loj0e9xbNA2H/UFxgHSnVkgyUPBT
gTk=
-----END CERTIFICATE-----
";

const PKCS1: &str = "\
-----BEGIN RSA PRIVATE KEY-----
MIIEowIBAAKCAQEAiv+f2YV3XPobZUXzIz5ajy5JzOjO/m/NITOGbXakqcHxfT5X
qF7X+TLA4SF/wfgWJKg76AIEpdPTOp53tDIMttNsTtHh4Tgt2oAXKwLVMmAT8KYR
OQxpC77XkD++6F4OCQFCl5eGxAk6xQUpKYjP7+q8f2iWqD3rST8Ay3jA17DXp+xp
Abu5dQzEKKc+DT1SSM0NqXPcL8iJA07hqY9Sob+L/HLwuaX9tMNvOAJruyy5v9W7
qgppii5MVlzevztXuerzi7lVQk6+ANV3J80uy5vtPCmPqBKV3kXZVVPJyyo2hRHo
37Nxg9ngWvU8vvuSNhY24PgMg6giDNKogJVMowIDAQABAoIBAA3bqo4/VkU40l5o
ePM8lj7MOKNrWqfXcbYrsu1a9NPP+EmqW4b33cSEoOJROrGWEG8bLs3U1a3KzrZ7
cifPDaF0tsms9z5DIZ81QhoRsDvThGlrxS/Q4vA+2LMTB++W4QNY0tDWVKNa4Dcg
apgvgbvDxYNWZB7l/X1SALxIj8FxRI5KI/nntIWPBZonZguPS8m66pOGZyhL8HKv
66xNrFCKNa7WbKWfAss7LVt2AN7Dt43wXPlRu+q8hcL0vs8rtR52q1+QskAgjgBh
KRJNoT4a7WS8+LvA7EOI28Z1zwL9ceVZ/VbDX0CXWs/jU03Do0FxfEdUm/9J8vma
GZ1/vpECgYEAwb3qL7yC6ubNUpbLHLBYSHCTckQ72liCi8ClXNmFFIiVgrNzxhsB
XFNY1sZ1VJzaBRrFZMj3x357CiWs7FsuZwYjdXRgJKOw/oCFFwBvHim9LdCewFMA
qY5t7aooNKbUXUrT8h0tOfOm4povKXOE4WK7JhPLG/Q6lmaCLDukbIUCgYEAt6pG
dtvrXwAzQKChbm5Q9v+IqNscefA6ILuOZHEEByj45W8TPyXnnINEzZ/i9Yzxhw2Z
MohrrdwKX+inunIOfv8DNXFhbMRupieQzvmT/nab7UX+aR+QZPelK7cE0L366r+x
SCVOvO6tQVQVfCzd2ZvFGMMcWpWe0r07R9zTkQcCgYBv7a4sIfZoiyq3uhJh4qc+
QnuMmksR2+yfnI5sU+aEdFwcBFywaM2ibyx1+HW0imGSbWL41PoBMNsYg6ehbRQj
xPIbWz5oLIGGpu082q1XebmnjE0Kw2kwi+6KTbGoqXEq7J4B1EVao58YbwcsJWbx
Zz7Dws+muLRYS6SMtXBKmQKBgBgC8uNnLQZmiEzSs0g0s/EWx08MFlT6yx6sZplL
DTPCb4fPVbzTv8v+fWhElu9zVcBKTtUEcM9yDQks6YC+mJaR0GGUSSBnLfAbDBuD
FY4XA5upovErZz1MAxQMAV0o+Tzngs3j0r9wlMYNsCFj3D0u2D28hGBzXyg+BRoI
DMDRAoGBAIt4blpTVaOPXVPioTR7OGYV/I0F4RhiB8N/BB2op6PGibukMVCuOuiM
dVotRXuNguLjCzJYmj6a119BS9OgLGSE6Ut/FcImX1mlVlmYNYP6ANsIibWuuyeN
c2IS30tcCt5tMdiOpPbRZzmzwA6bcx03wxD5xUYro589yh9Ugm2D
-----END RSA PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIDCzCCAfOgAwIBAgIUB2BPsD7K8TqWUrDAHQAK4H/FAyUwDQYJKoZIhvcNAQEL
BQAwFDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTE2MjgxN1oYDzIxMjYx
MDI4MTYyODE3WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwggEiMA0GCSqGSIb3DQEB
AQUAA4IBDwAwggEKAoIBAQCK/5/ZhXdc+htlRfMjPlqPLknM6M7+b80hM4ZtdqSp
wfF9PleoXtf5MsDhIX/B+BYkqDvoAgSl09M6nne0Mgy202xO0eHhOC3agBcrAtUy
YBPwphE5DGkLvteQP77oXg4JAUKXl4bECTrFBSkpiM/v6rx/aJaoPetJPwDLeMDX
sNen7GkBu7l1DMQopz4NPVJIzQ2pc9wvyIkDTuGpj1Khv4v8cvC5pf20w284Amu7
LLm/1buqCmmKLkxWXN6/O1e56vOLuVVCTr4A1XcnzS7Lm+08KY+oEpXeRdlVU8nL
KjaFEejfs3GD2eBa9Ty++5I2Fjbg+AyDqCIM0qiAlUyjAgMBAAGjUzBRMB0GA1Ud
DgQWBBSfDf9bZIchvSPTE5FNBUlu57C1EzAfBgNVHSMEGDAWgBSfDf9bZIchvSPT
E5FNBUlu57C1EzAPBgNVHRMBAf8EBTADAQH/MA0GCSqGSIb3DQEBCwUAA4IBAQBO
FB8Z97dbHC9veCISnoSU2BcptDOYdW/pQLft0Juvl+NE5BtfFF5d0IPQQQf87UdL
BxbHyUrw2+EfMhIkypKELDt0G3VGl5znTMHSY9ZJ/gzSWEyo0c/lehbGGkL7vhk1
t7VKOb7sef6UbGt/s8h0EXKmyMYxjPB0EYRQkHCZwjrNAdr43DIl32IT0glqcCTt
S70tRVU1+XPYeTy+PGsmUTjo4S4qfCDd2ufX9zeTgrO9nnhQjaxyP4nyuwuCUsP8
+gvDbWKMCxSH5BMVGudhxtySkoYwp4IMgUDY0EETSdTeRtUtwcNSzrmtnX+5aw5k
agR5iN5URbHF0O+EP+fl
-----END CERTIFICATE-----
";
