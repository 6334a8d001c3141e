//! The program `conntrack-exporter`: the host's TCP connections for Prometheus and OTLP.
//!
//! It does what tcp_established_exporter does, with its settings under their names, and reads the
//! table as [`host`](super) tells. `conntrack-exporter --help` has the settings; a page at `/` shows
//! the effective ones and where each was said.
//!
//! - `specs` are the settings that there are, `args` the flags, `file` is the config file, `settings`
//!   merges them: a flag goes before the environment, that before the file, that before the default.
//! - `run` is the service, `serve` its HTTP, `page` what people see, `otlp` what is sent, `process` what
//!   is told of itself, `once` the table of `--once`.

mod args;
mod file;
mod once;
mod otlp;
mod page;
mod process;
mod run;
mod serve;
mod settings;
mod specs;

use std::ffi::OsString;
use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;

use crate::config::ConfigError;

/// Why the program ends before it is told to.
#[derive(Debug)]
enum Failure {
    /// It was not understood: exit code 2.
    Usage(ConfigError),
    /// It can't run: exit code 1.
    Run(ConfigError),
}

/// The program, with the arguments and the environment of this process. It returns when it is told to
/// stop (SIGTERM, SIGINT).
///
/// Exit codes: 0, also for a graceful stop; 1 where it can't run, as when the address is in use; 2
/// where a setting can't be used. What is wrong is on stderr.
pub fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    match start(arguments) {
        Ok(code) => code,
        Err(failure) => {
            let (error, code) = match failure {
                Failure::Usage(error) => (error, 2),
                Failure::Run(error) => (error, 1),
            };
            say(&error);
            if code == 2 {
                say("`conntrack-exporter --help` has the settings");
            }
            ExitCode::from(code)
        }
    }
}

/// A config file's text, up to the page that shows what it says. For the fuzz target.
#[cfg(fuzzing)]
pub(super) fn fuzz_config(text: &str) {
    let lines = file::hold(text);
    let flags = args::parse(vec!["conntrack-exporter".into()]).expect("no flags");
    let config = ("<b>".into(), settings::Origin::Flag("config".to_owned()));
    if let Ok(settings) = settings::Settings::decide(&flags, &|_| None, Some(config), &lines) {
        page::hold(&page::rows(&settings, "off"));
        settings
            .monitor()
            .scanner()
            .expect("what was checked can be used");
    }
}

/// A line on stderr. Whoever read it may have gone: that ends nothing, as `eprintln!` would.
fn say(text: impl fmt::Display) {
    let line = format!("conntrack-exporter: {text}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn start(arguments: Vec<OsString>) -> Result<ExitCode, Failure> {
    let flags = match args::parse(arguments) {
        Ok(flags) => flags,
        Err(said) => {
            // Help and version too: on stdout, and no failure.
            let _ = said.print();
            return Ok(ExitCode::from(u8::try_from(said.exit_code()).unwrap_or(2)));
        }
    };
    if let Some(text) = flags.document() {
        let text = text.map_err(Failure::Usage)?;
        // Who reads may have gone, as `head` does.
        let _ = std::io::stdout().write_all(&text);
        return Ok(ExitCode::SUCCESS);
    }
    let environment = |name: &str| std::env::var_os(name);
    let settings = settings::Settings::read(&flags, &environment).map_err(Failure::Usage)?;
    if flags.once() {
        once::print(&settings)?;
    } else {
        run::run(settings)?;
    }
    Ok(ExitCode::SUCCESS)
}
