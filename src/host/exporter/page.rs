//! The page at `/`: what is in force and where it was said, and what is seen now.

use std::fmt::Write as _;

use super::serve::Site;

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
    for said in &settings.said {
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            said.name,
            escaped(&shown(said.name, &said.value)),
            escaped(&meant(site, said.name)),
            escaped(&said.origin.to_string()),
        );
    }
    if let Some((path, origin)) = &settings.config {
        let _ = writeln!(
            page,
            "<tr><td>config</td><td>{}</td><td></td><td>{}</td></tr>",
            escaped(&path.display().to_string()),
            escaped(&origin.to_string()),
        );
    }
    page.push_str("</table></body></html>\n");
    page
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
fn meant(site: &Site, name: &str) -> String {
    let settings = &site.settings;
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
        "otlp" => site.otlp.clone(),
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
}
