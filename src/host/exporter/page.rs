//! The page at `/`: what is in force and where it was said, and what is seen now.

use std::fmt::Write as _;

use super::serve::Site;
use super::settings::Settings;

/// As [`POLICY`] has its hash.
const STYLE: &str = "body{font-family:sans-serif;margin:2em auto;max-width:60em;padding:0 1em}\
    table{border-collapse:collapse}td,th{text-align:left;padding:.2em 1em .2em 0;vertical-align:top}\
    td:nth-child(2){font-family:monospace}";

/// What a browser may do with an answer: show it, in this style.
pub(super) const POLICY: &str = "default-src 'none'; style-src 'sha256-5Hxb9ASmcWOSDKPf1ZMXjErYrbMvjo+QDavYcOkpkHE='; base-uri 'none'; \
    form-action 'none'; frame-ancestors 'none'";

/// Whole, as HTML.
pub(super) fn render(site: &Site) -> String {
    let (settings, monitor) = (&site.settings, &site.monitor);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <title>conntrack-exporter</title><style>{STYLE}</style></head>\n\
         <body><h1>conntrack-exporter</h1>\n"
    );
    let snapshot = monitor.snapshot();
    // Writing to a `String` can't fail.
    let _ = write!(
        page,
        "<p>The TCP connections of this host: {} established, {} of them for {} s or longer. \
         <a href=\"/metrics\">Metrics</a>, <a href=\"/-/healthy\">health</a>.</p>\n\
         <p>Read by {} in {:.1} ms, {:.1} s ago.</p>\n",
        snapshot.established(),
        snapshot.long_term(),
        settings.duration.as_secs(),
        snapshot.scan.source.as_str(),
        snapshot.scan.took.as_secs_f64() * 1e3,
        snapshot.scan.at.elapsed().as_secs_f64(),
    );
    if let Some(failure) = monitor.failure() {
        let failure = escaped(&failure);
        let _ = writeln!(
            page,
            "<p><strong>The last scan failed: {failure}</strong></p>"
        );
    }
    page.push_str("<table><tr><th>setting</th><th>value</th><th>meant</th><th>said by</th></tr>\n");
    page.push_str(&rows(settings, &site.otlp));
    page.push_str("</table></body></html>\n");
    page
}

/// The table's: every setting, and the file.
pub(super) fn rows(settings: &Settings, otlp: &str) -> String {
    let mut rows = String::new();
    for said in &settings.said {
        let value = shown(said.name, &said.value);
        let meant = meant(settings, otlp, said.name);
        rows.push_str(&row([said.name, &value, &meant, &said.origin.to_string()]));
    }
    if let Some((path, origin)) = &settings.config {
        let path = path.display().to_string();
        rows.push_str(&row(["config", &path, "", &origin.to_string()]));
    }
    rows
}

fn row(cells: [&str; 4]) -> String {
    let [name, value, meant, origin] = cells.map(escaped);
    format!("<tr><td>{name}</td><td>{value}</td><td>{meant}</td><td>{origin}</td></tr>\n")
}

/// A URL may have credentials in it.
fn shown(name: &str, value: &str) -> String {
    if name == "otlp" && value.contains("://") {
        "a URL".to_owned()
    } else {
        value.to_owned()
    }
}

/// What became of it, where that is not plain.
fn meant(settings: &Settings, otlp: &str, name: &str) -> String {
    match name {
        "port" if settings.ports.is_all() => {
            format!("all but {}, the exporter's own", settings.listen.port())
        }
        "port" => settings.ports.to_string(),
        "listen" => settings.listen.to_string(),
        "allow-host" => match &settings.allowed {
            Some(_) => "and IP addresses, localhost, *.localhost".to_owned(),
            None => "any, for it listens for others".to_owned(),
        },
        "group-by" => settings.group_by.to_string(),
        "otlp" => otlp.to_owned(),
        _ => String::new(),
    }
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Panics if there is markup in it but ours.
#[cfg(any(test, fuzzing))]
pub(super) fn hold(rows: &str) {
    for row in rows.lines() {
        let row = row.strip_prefix("<tr><td>").expect("a row begins");
        let row = row.strip_suffix("</td></tr>").expect("a row ends");
        let cells: Vec<_> = row.split("</td><td>").collect();
        assert_eq!(cells.len(), 4, "{row}");
        let plain = |cell: &&str| !cell.contains(['<', '>', '"', '\'']);
        assert!(cells.iter().all(plain), "{row}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_was_said_becomes_markup() {
        assert_eq!(
            escaped("<script>'\"&amp;"),
            "&lt;script&gt;&#39;&quot;&amp;amp;"
        );
        assert_eq!(shown("otlp", "http://user:secret@x"), "a URL");
    }

    proptest::proptest! {
        #[test]
        fn no_cell_is_markup(
            cells in proptest::array::uniform4("[<>&'\"/=a-z]{0,20}|[^\\x00-\\x1f\u{85}\u{2028}\u{2029}]{0,20}"),
        ) {
            let row = row(cells.each_ref().map(String::as_str));
            hold(&row);
            let back = row.trim_end().replace("<tr><td>", "").replace("</td></tr>", "");
            let back = back.replace("</td><td>", "<").replace("&lt;", "\u{1}").replace("&gt;", ">");
            let back = back.replace("&quot;", "\"").replace("&#39;", "'").replace("&amp;", "&");
            let back: Vec<_> = back.split('<').map(|cell| cell.replace('\u{1}', "<")).collect();
            proptest::prop_assert_eq!(back, cells);
        }
    }
}
