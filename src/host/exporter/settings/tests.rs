use std::collections::HashMap;

use super::super::args;
use super::super::specs::SETTINGS;
use super::*;

fn read(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Settings, ConfigError> {
    let program = ["conntrack-exporter"].iter().chain(arguments);
    let flags = args::parse(program.map(OsString::from).collect()).unwrap();
    let variables: HashMap<_, _> = variables.iter().copied().collect();
    Settings::read(&flags, &|name| variables.get(name).map(OsString::from))
}

/// A file of its own for each test.
struct File(PathBuf);

impl File {
    fn new(test: &str, text: &str) -> Self {
        let name = format!("conntrack-exporter-{}-{test}.conf", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn the_defaults_are_the_seeds() {
    let settings = read(&[], &[]).unwrap();
    assert!(!settings.simple && settings.ipv6 && settings.ports.is_all());
    assert_eq!(settings.listen.to_string(), "127.0.0.1:9690");
    assert_eq!(settings.duration, Duration::from_secs(6));
    assert_eq!(settings.period, Duration::from_secs(1));
    assert_eq!(settings.otlp, Otlp::Auto);
    assert!(
        settings
            .said
            .iter()
            .all(|said| said.origin == Origin::Default)
    );
}

#[test]
fn every_setting_is_read_and_shown_in_its_order() {
    let settings = read(&[], &[]).unwrap();
    let said = settings.said.iter().map(|said| said.name);
    assert!(said.eq(SETTINGS.iter().map(|spec| spec.name)));
}

/// Every setting: the flag before the variable, that before the file, that before the default.
#[test]
fn a_flag_goes_before_the_environment_and_that_before_the_file() {
    let values = [
        ("simple", ["true", "0", "T"]),
        ("tcpv6", ["false", "1", "F"]),
        ("port", ["1", "2", "3"]),
        ("listen", ["11", "12", "13"]),
        ("allow-host", ["a.example", "b.example,c", "localhost"]),
        ("duration", ["1", "2", "3"]),
        ("period", ["2", "3", "4"]),
        ("group-by", ["cgroup", "subnet/1/2", "none"]),
        ("rows", ["1", "2", "1800"]),
        ("limit", ["1", "2", "100000000"]),
        ("proc-root", ["/proc", "/", "/tmp"]),
        ("otlp", ["false", "true", "http://x:1"]),
    ];
    assert_eq!(values.len(), SETTINGS.len());
    for (name, [in_file, in_variable, in_flag]) in values {
        let file = File::new(
            &format!("order-{name}"),
            &format!("# x\n{name} {in_file}\n"),
        );
        let variable = name.to_uppercase().replace('-', "_");
        let flag = format!("--{name}={in_flag}");
        let (config, variables) = (["--conf", file.path()], [(&*variable, in_variable)]);
        let origin = |settings: Settings| {
            let mut said = settings.said.into_iter();
            let said = said.find(|said| said.name == name).unwrap();
            (said.value, said.origin.to_string())
        };
        let said = |arguments: &[&str], variables: &[(&str, &str)]| {
            origin(read(arguments, variables).unwrap())
        };
        let from_file = (in_file.to_owned(), format!("{}:2", file.path()));
        let from_variable = (
            in_variable.to_owned(),
            format!("environment variable {variable}"),
        );
        let from_flag = (in_flag.to_owned(), format!("flag --{name}"));
        assert_eq!(said(&config, &[]), from_file);
        assert_eq!(said(&[], &[("CONFIG", file.path())]), from_file);
        assert_eq!(said(&config, &variables), from_variable);
        let all = [config[0], config[1], &flag];
        assert_eq!(said(&all, &variables), from_flag);
        assert_eq!(said(&[&flag], &variables), from_flag);
        // One that is empty is not set.
        assert_eq!(said(&config, &[(&variable, "")]), from_file);
    }
}

#[test]
fn the_flag_names_the_file_before_the_variable() {
    let (one, two) = (
        File::new("one", "duration 1"),
        File::new("two", "duration 2"),
    );
    let settings = read(&["--config", one.path()], &[("CONFIG", two.path())]).unwrap();
    assert_eq!(settings.duration, Duration::from_secs(1));
    let (path, origin) = settings.config.unwrap();
    assert_eq!(
        (path, origin.to_string()),
        (one.0.clone(), "flag --config".to_owned())
    );
}

#[test]
fn what_can_not_be_used_is_named_with_its_place_and_the_way_out() {
    let file = File::new("wrong", "\nduration six");
    for (arguments, variables, setting, help) in [
        (
            &["--simple=maybe"][..],
            &[][..],
            "simple (flag --simple)",
            "true or false",
        ),
        (&["--tcpv6="], &[], "tcpv6 (flag --tcpv6)", "true or false"),
        (
            &[],
            &[("SIMPLE", "yes")],
            "simple (environment variable SIMPLE)",
            "true or false",
        ),
        (
            &["--port", "65536"],
            &[],
            "port (flag --port)",
            "1 to 65535",
        ),
        (
            &["--port", "443", "--port", "x y"],
            &[],
            "port (flag --port)",
            "/etc/services",
        ),
        (
            &[],
            &[("PORT", "0")],
            "port (environment variable PORT)",
            "-1 means all",
        ),
        (&["--port", "9690"], &[], "port (flag --port)", "own port"),
        (
            &["--listen", "65536"],
            &[],
            "listen (flag --listen)",
            "out of range",
        ),
        (
            &["--listen", "-1"],
            &[],
            "listen (flag --listen)",
            "out of range",
        ),
        (
            &["--listen", ":9690"],
            &[],
            "listen (flag --listen)",
            "0.0.0.0:9690",
        ),
        (
            &["--listen", "example.org:9690"],
            &[],
            "listen (flag --listen)",
            "0.0.0.0:9690",
        ),
        (
            &["--allow-host", "http://x"],
            &[],
            "allow-host (flag --allow-host)",
            "without scheme",
        ),
        (
            &[],
            &[("ALLOW_HOST", "a,")],
            "allow-host (environment variable ALLOW_HOST)",
            "names of hosts",
        ),
        (
            &["--duration", "-1"],
            &[],
            "duration (flag --duration)",
            "whole seconds",
        ),
        (
            &["--duration", "6s"],
            &[],
            "duration (flag --duration)",
            "whole seconds",
        ),
        (
            &["--duration", "99999999999999999999"],
            &[],
            "duration (flag --duration)",
            "ten years",
        ),
        (&["--period", "0"], &[], "period (flag --period)", "0.1"),
        (&["--period", "NaN"], &[], "period (flag --period)", "0.1"),
        (&["--rows", "0"], &[], "rows (flag --rows)", "1 to 1800"),
        (
            &[],
            &[("ROWS", "1801")],
            "rows (environment variable ROWS)",
            "1 to 1800",
        ),
        (
            &["--limit", "-1"],
            &[],
            "limit (flag --limit)",
            "1 to 100000000",
        ),
        (
            &[],
            &[("LIMIT", "100000001")],
            "limit (environment variable LIMIT)",
            "1 to 100000000",
        ),
        (
            &["--group-by", "subnet/33"],
            &[],
            "group-by (flag --group-by)",
            "subnet/24",
        ),
        (
            &["--group-by", "cgroup", "--proc-root", "/proc"],
            &[],
            "group-by (flag --group-by)",
            "netlink",
        ),
        (
            &["--proc-root", "/nothing"],
            &[],
            "proc-root (flag --proc-root)",
            "no such directory",
        ),
        (&["--otlp=maybe"], &[], "otlp (flag --otlp)", "URL"),
        (
            &["--conf", file.path()],
            &[],
            &format!("duration ({}:2)", file.path()),
            "whole seconds",
        ),
        (
            &["--conf", "/nothing"],
            &[],
            "config (flag --config)",
            "can't be read",
        ),
        (
            &[],
            &[("CONFIG", "/nothing")],
            "config (environment variable CONFIG)",
            "can't be read",
        ),
    ] {
        let error = read(arguments, variables).unwrap_err();
        assert_eq!(error.setting(), setting, "{error}");
        assert!(error.to_string().contains(help), "{error}");
    }
}

#[test]
fn go_style_booleans_addresses_and_otlp_are_read() {
    for (value, expected) in [
        ("1", true),
        ("t", true),
        ("True", true),
        ("0", false),
        ("F", false),
    ] {
        let settings = read(&[&format!("--simple={value}")], &[]).unwrap();
        assert_eq!(settings.simple, expected);
    }
    for (value, expected) in [
        ("0", "127.0.0.1:0"),
        ("localhost:80", "127.0.0.1:80"),
        ("0.0.0.0:9690", "0.0.0.0:9690"),
        ("[::]:1", "[::]:1"),
    ] {
        let settings = read(&["--listen", value], &[]).unwrap();
        assert_eq!(settings.listen.to_string(), expected);
    }
    assert_eq!(read(&["--otlp=auto"], &[]).unwrap().otlp, Otlp::Auto);
    assert_eq!(read(&["--otlp=false"], &[]).unwrap().otlp, Otlp::Off);
    assert_eq!(read(&["--otlp"], &[]).unwrap().otlp, Otlp::On);
    let to = Otlp::To("http://x:1".to_owned());
    assert_eq!(read(&["--otlp=http://x:1"], &[]).unwrap().otlp, to);
}

/// What passes here is not refused there, where an error would have no place.
#[test]
fn the_monitor_takes_what_the_settings_take() {
    for (rows, limit) in [("1", "1"), ("1800", "100000000")] {
        let settings = read(&["--rows", rows, "--limit", limit], &[]).unwrap();
        assert!(settings.monitor().scanner().is_ok());
    }
    assert!(Monitor::builder().rows(MOST_ROWS + 1).scanner().is_err());
    // The defaults are the library's.
    let settings = read(&[], &[]).unwrap().monitor();
    assert_eq!(format!("{settings:?}"), format!("{:?}", Monitor::builder()));
}

/// A table is of any port, also that of an exporter that runs.
#[test]
fn the_exporters_own_port_is_refused_only_where_it_listens() {
    let error = read(&["--port", "9690"], &[]).unwrap_err();
    assert!(error.to_string().contains("own port"), "{error}");
    assert!(read(&["--port", "9690", "--once"], &[]).is_ok());
}

#[test]
fn names_are_checked_on_the_loopback_and_where_some_were_said() {
    let allowed = |arguments: &[&str]| read(arguments, &[]).unwrap().allowed;
    let names = |names: &[&str]| Some(names.iter().map(ToString::to_string).collect());
    for listen in ["9690", "127.0.0.2:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        assert_eq!(
            allowed(&["--listen", listen]),
            names(&["localhost"]),
            "{listen}"
        );
    }
    for listen in ["0.0.0.0:1", "[::]:1", "192.0.2.1:1"] {
        assert_eq!(allowed(&["--listen", listen]), None, "{listen}");
        let said = ["--listen", listen, "--allow-host", "A.example., b"];
        assert_eq!(allowed(&said), names(&["a.example", "b"]), "{listen}");
    }
}
