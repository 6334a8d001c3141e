//! The flags.
//!
//! Values are taken as text here and read in [`settings`](super::settings), where those of the
//! environment and the file are too: so an error is the same wherever the value was said.

use std::ffi::OsString;

use clap::builder::{PossibleValuesParser, ValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::specs::{CONFIG, PORT, SETTINGS, Spec};
use crate::config::ConfigError;

/// What was said on the command line.
#[derive(Debug)]
pub(super) struct Flags(ArgMatches);

impl Flags {
    /// The value as it was said; several are a list.
    pub(super) fn get(&self, name: &str) -> Option<OsString> {
        let values = self.0.try_get_many::<OsString>(name).ok()??;
        let values: Vec<_> = values.cloned().collect();
        Some(values.join(std::ffi::OsStr::new(",")))
    }

    pub(super) fn once(&self) -> bool {
        self.0.get_flag("once")
    }

    /// Completions or the manual page, if they were asked for.
    pub(super) fn document(&self) -> Option<Result<Vec<u8>, ConfigError>> {
        if let Some(shell) = self.0.get_one::<String>("completions") {
            let mut text = Vec::new();
            // One of the possible values.
            return Some(match shell.parse::<clap_complete::Shell>() {
                Ok(shell) => {
                    clap_complete::generate(shell, &mut command(), "conntrack-exporter", &mut text);
                    Ok(text)
                }
                Err(why) => Err(ConfigError::new("--completions", shell, &why)),
            });
        }
        if self.0.get_flag("man") {
            let mut text = Vec::new();
            let page = clap_mangen::Man::new(command()).render(&mut text);
            let failed = |error| {
                ConfigError::new("--man", "true", "it could not be written").with_source(error)
            };
            return Some(page.map(|()| text).map_err(failed));
        }
        None
    }
}

/// Reads the command line; the error may be help or version.
pub(super) fn parse(arguments: Vec<OsString>) -> Result<Flags, clap::Error> {
    let arguments: Vec<_> = arguments.into_iter().map(two_dashes).collect();
    let matches = command().try_get_matches_from(&arguments);
    matches.map(Flags).map_err(|error| {
        let hint = (error.kind() == ErrorKind::UnknownArgument).then(|| apart(&arguments));
        match hint.flatten() {
            Some(hint) => command().error(ErrorKind::UnknownArgument, hint),
            None => error,
        }
    })
}

/// `--otlp URL`: what may stand alone takes its value by `=`, as in Go.
fn apart(arguments: &[OsString]) -> Option<String> {
    arguments.windows(2).find_map(|two| {
        let [flag, value] = [two[0].to_str()?, two[1].to_str()?];
        let alone = |spec: &&&Spec| spec.alone && flag.strip_prefix("--") == Some(spec.name);
        SETTINGS.iter().find(alone)?;
        // It may be a secret's.
        let shown = if value.contains("://") { "URL" } else { value };
        (!value.starts_with('-'))
            .then(|| format!("{flag} takes its value by `=`: write {flag}={shown}"))
    })
}

/// tcp_established_exporter's flags may have one dash, as all of Go's.
fn two_dashes(argument: OsString) -> OsString {
    let known = |text: &str| {
        let name = text.strip_prefix('-')?;
        let name = name.split('=').next()?;
        let known = SETTINGS.iter().any(|spec| spec.name == name);
        (known || name == "config" || name == "conf").then(|| format!("-{text}").into())
    };
    argument.to_str().and_then(known).unwrap_or(argument)
}

fn command() -> Command {
    let mut command = Command::new("conntrack-exporter")
        .version(env!("CARGO_PKG_VERSION"))
        // Of several, the last: as Go's flags.
        .args_override_self(true)
        .about("The TCP connections of this host for Prometheus and OTLP: how many, on which ports, and for how long")
        .long_about(
            "The TCP connections of this host for Prometheus and OTLP: how many, on which ports, and for how long.\n\n\
             /metrics has netstat_tcp_longterm_connections_total and the others, / shows the effective settings, \
             /-/healthy says whether the kernel's table can be read. It needs no privileges.",
        )
        .after_help(
            "Every setting is a flag, an environment variable (SIMPLE, GROUP_BY, ...) and a line of the \
             config file (`simple true`, `port=443`, `simple` alone; # begins a comment). A flag goes \
             before the environment, that before the file; of a flag that is given several times, the \
             last counts, but ports are added up. OTLP is set up by OTEL_*.\n\n\
             Exit codes: 0, 1 where it can't run, 2 where a setting can't be used.",
        );
    for spec in SETTINGS {
        let shown = format!(
            "{} [default: {}] [env: {}]",
            spec.help,
            spec.default,
            spec.variable()
        );
        let mut argument = Arg::new(spec.name)
            .long(spec.name)
            .value_name(spec.value)
            .help(shown)
            .value_parser(value_parser!(OsString));
        if spec.alone {
            argument = argument
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true");
        } else {
            // Also `-1`.
            argument = argument.allow_hyphen_values(true);
        }
        if spec.name == PORT.name {
            argument = argument.action(ArgAction::Append);
        }
        command = command.arg(argument);
    }
    // As clap_complete reads them.
    let shells = ["bash", "elvish", "fish", "powershell", "zsh"];
    command
        .arg(
            Arg::new(CONFIG.0)
                .long(CONFIG.0)
                .visible_alias("conf")
                .value_name("FILE")
                .help("A file of settings, one per line [env: CONFIG]")
                .value_parser(value_parser!(OsString)),
        )
        .arg(
            Arg::new("once")
                .long("once")
                .action(ArgAction::SetTrue)
                .help("Watch for as long as --duration, print a table, and end; --duration 0 for a table at once"),
        )
        .arg(
            Arg::new("completions")
                .long("completions")
                .value_name("SHELL")
                .value_parser(ValueParser::from(PossibleValuesParser::new(shells)))
                .help("Print completions for a shell, and end"),
        )
        .arg(
            Arg::new("man")
                .long("man")
                .action(ArgAction::SetTrue)
                .help("Print the manual page (roff), and end"),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Flags, clap::Error> {
        let program = ["conntrack-exporter"].iter().chain(arguments);
        parse(program.map(OsString::from).collect())
    }

    #[test]
    fn the_command_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn flags_are_taken_as_go_takes_them_and_as_people_write_them() {
        for (arguments, name, value) in [
            (&["--simple"][..], "simple", Some("true")),
            (&["--simple=false"], "simple", Some("false")),
            (&["-simple"], "simple", Some("true")),
            (&["-tcpv6=F"], "tcpv6", Some("F")),
            (&["--port", "-1"], "port", Some("-1")),
            (&["-port", "443"], "port", Some("443")),
            (&["--port=443", "--port", "http"], "port", Some("443,http")),
            (&["--conf", "x"], "config", Some("x")),
            (&["-config=x"], "config", Some("x")),
            (&["--otlp=http://x"], "otlp", Some("http://x")),
            // Go's flags take the last; our ports are added up.
            (&["-listen=1", "--listen", "2"], "listen", Some("2")),
            (&["-simple", "-simple=false"], "simple", Some("false")),
            (&["--conf", "x", "--config=y"], "config", Some("y")),
            (&["-port=80", "-port=81"], "port", Some("80,81")),
            (&["--once", "--once"], "simple", None),
            (&[], "simple", None),
        ] {
            let flags = parsed(arguments).unwrap();
            let value = value.map(OsString::from);
            assert_eq!(flags.get(name), value, "{arguments:?}");
        }
        for wrong in [
            &["--simple", "true"][..],
            &["--nothing"],
            &["--port"],
            &["443"],
            &["--completions", "cobol"],
        ] {
            assert_eq!(parsed(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }

    #[test]
    fn a_value_that_stands_apart_is_told_where_it_belongs() {
        for (arguments, hint) in [
            (&["--simple", "true"][..], Some("write --simple=true")),
            (&["-tcpv6", "false", "--once"], Some("write --tcpv6=false")),
            (
                &["--otlp", "http://user:secret@x"],
                Some("write --otlp=URL"),
            ),
            (&["--otlp", "--nothing"], None),
            (&["--listen", "1", "x"], None),
        ] {
            let error = parsed(arguments).unwrap_err().to_string();
            assert_eq!(error.contains("by `=`"), hint.is_some(), "{error}");
            assert!(error.contains(hint.unwrap_or_default()), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn documents_are_printed() {
        let text = |arguments: &[&str]| {
            let text = parsed(arguments).unwrap().document().unwrap().unwrap();
            String::from_utf8(text).unwrap()
        };
        for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
            assert!(text(&["--completions", shell]).contains("tcpv6"), "{shell}");
        }
        assert!(text(&["--man"]).contains(".TH conntrack-exporter"));
    }
}
