//! What is asked for: the page's query string, understood or refused with a word on what is wrong.

use std::fmt;
use std::time::Duration;

use crate::event::{ConnectionState, Direction};
use crate::inspect::Place;

/// Rows of a page that says nothing else.
const ROWS: usize = 50;
/// Rows of a page at most.
const MOST_ROWS: usize = 1_000;
/// A query is no longer than that.
const LONGEST: usize = 2_048;

/// As what the answer is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Html,
    Json,
    Text,
}

/// By what connections are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    #[default]
    Age,
    Idle,
    Active,
    Requests,
    InFlight,
    Read,
    Written,
    State,
    Name,
    Host,
}

impl Sort {
    pub(super) const ALL: [Self; 10] = [
        Self::Age,
        Self::Idle,
        Self::Active,
        Self::Requests,
        Self::InFlight,
        Self::Read,
        Self::Written,
        Self::State,
        Self::Name,
        Self::Host,
    ];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Age => "age",
            Self::Idle => "idle",
            Self::Active => "active",
            Self::Requests => "requests",
            Self::InFlight => "in_flight",
            Self::Read => "read",
            Self::Written => "written",
            Self::State => "state",
            Self::Name => "name",
            Self::Host => "host",
        }
    }

    /// Whether what is largest is wanted first, if nothing else is said.
    const fn descends(self) -> bool {
        !matches!(self, Self::State | Self::Name | Self::Host)
    }
}

/// A listener's or dialer's name, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// `=name`: this one.
    Exactly(String),
    /// In lower case.
    Part(String),
}

impl Name {
    fn parse(text: &str) -> Self {
        match text.strip_prefix('=') {
            Some(name) => Self::Exactly(name.to_owned()),
            None => Self::Part(text.to_lowercase()),
        }
    }

    pub(super) fn is(&self, name: &str) -> bool {
        match self {
            Self::Exactly(whole) => name == whole,
            Self::Part(part) => name.to_lowercase().contains(part),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(name) => write!(f, "={name}"),
            Self::Part(part) => f.write_str(part),
        }
    }
}

/// Which connections, in which order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) name: Option<Name>,
    pub(super) direction: Option<Direction>,
    /// Part of the host, in lower case: of the target, or of an accepted connection's peer.
    pub(super) host: Option<String>,
    pub(super) state: Option<ConnectionState>,
    pub(super) older_than: Option<Duration>,
    pub(super) idle_longer_than: Option<Duration>,
    pub(super) sort: Sort,
    pub(super) descending: bool,
    /// From 1.
    pub(super) page: usize,
    pub(super) rows: usize,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            name: None,
            direction: None,
            host: None,
            state: None,
            older_than: None,
            idle_longer_than: None,
            sort: Sort::default(),
            descending: true,
            page: 1,
            rows: ROWS,
        }
    }
}

/// A query string, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query {
    pub(super) filter: Filter,
    pub(super) format: Option<Format>,
    /// The page's script asks for what changes.
    pub(super) live: bool,
}

/// The states by which connections can be found.
pub(super) const STATES: [ConnectionState; 6] = [
    ConnectionState::Connecting,
    ConnectionState::New,
    ConnectionState::Open,
    ConnectionState::Active,
    ConnectionState::Idle,
    ConnectionState::Hijacked,
];

/// What each view understands beside `format`.
const OF_CONNECTIONS: &[&str] = &[
    "name",
    "direction",
    "host",
    "state",
    "older_than",
    "idle_longer_than",
    "sort",
    "page",
    "rows",
];
const OF_CLOSED: &[&str] = &["name", "direction", "host", "page", "rows"];
const OF_POOLS: &[&str] = &["rows"];

impl Query {
    /// What is empty is not asked for: a form sends all its fields.
    pub(super) fn parse(query: &str, place: &Place) -> Result<Self, String> {
        let understood = match place {
            Place::Connections => OF_CONNECTIONS,
            Place::Closed => OF_CLOSED,
            Place::Pools => OF_POOLS,
            Place::Overview | Place::Connection(_) => &[],
        };
        if query.len() > LONGEST {
            return Err(format!("the query is longer than {LONGEST} bytes"));
        }
        let mut parsed = Self::default();
        let filter = &mut parsed.filter;
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let value = value.trim();
            if value.is_empty() {
                continue;
            }
            let bad = |help: &str| Err(format!("{key} = {value:?}: {help}"));
            if !understood.contains(&&*key) && !matches!(&*key, "format" | "live") {
                let mut known = understood.to_vec();
                known.push("format");
                return Err(format!(
                    "{key} is not known here; {}",
                    one_of(known.into_iter())
                ));
            }
            match &*key {
                "name" => filter.name = Some(Name::parse(value)),
                "host" => filter.host = Some(value.to_lowercase()),
                "direction" => match value {
                    "inbound" | "in" => filter.direction = Some(Direction::Inbound),
                    "outbound" | "out" => filter.direction = Some(Direction::Outbound),
                    _ => return bad("inbound or outbound"),
                },
                "state" => match STATES.iter().find(|state| state.as_str() == value) {
                    Some(state) => filter.state = Some(*state),
                    None => return bad(&one_of(STATES.iter().map(|state| state.as_str()))),
                },
                "older_than" | "idle_longer_than" => {
                    let Some(time) = duration(value) else {
                        return bad("a time such as 30, 30s, 500ms, 5m, 2h or 1d");
                    };
                    if key == "older_than" {
                        filter.older_than = Some(time);
                    } else {
                        filter.idle_longer_than = Some(time);
                    }
                }
                "sort" => {
                    let (bare, up) = match value.strip_prefix('-') {
                        Some(bare) => (bare, false),
                        None => (value.strip_prefix('+').unwrap_or(value), true),
                    };
                    let Some(sort) = Sort::ALL.iter().find(|sort| sort.as_str() == bare) else {
                        let known = one_of(Sort::ALL.iter().map(|sort| sort.as_str()));
                        return bad(&format!("{known}; with a minus the other way round"));
                    };
                    filter.sort = *sort;
                    filter.descending = sort.descends() == up;
                }
                "page" => match value.parse() {
                    Ok(page @ 1..=1_000_000) => filter.page = page,
                    _ => return bad("a number from 1 on"),
                },
                "rows" => match value.parse() {
                    Ok(rows @ 1..=MOST_ROWS) => filter.rows = rows,
                    _ => return bad("a number from 1 to 1000"),
                },
                "format" => match value {
                    "html" => parsed.format = Some(Format::Html),
                    "json" => parsed.format = Some(Format::Json),
                    "text" => parsed.format = Some(Format::Text),
                    _ => return bad("html, json or text"),
                },
                "live" => parsed.live = value == "1",
                _ => {}
            }
        }
        Ok(parsed)
    }
}

impl Filter {
    /// The query string for the same with another order.
    pub(super) fn sorted_by(&self, sort: Sort) -> String {
        let descending = if self.sort == sort {
            !self.descending
        } else {
            sort.descends()
        };
        Self {
            sort,
            descending,
            page: 1,
            ..self.clone()
        }
        .query()
    }

    /// The query string for another page of the same.
    pub(super) fn at_page(&self, page: usize) -> String {
        Self {
            page,
            ..self.clone()
        }
        .query()
    }

    /// As a query string, without what is as by default.
    pub(super) fn query(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                query.append_pair(key, &value);
            }
        };
        put("name", self.name.as_ref().map(ToString::to_string));
        put("direction", self.direction.map(|d| d.as_str().into()));
        put("host", self.host.clone());
        put("state", self.state.map(|state| state.as_str().into()));
        put("older_than", self.older_than.map(text));
        put("idle_longer_than", self.idle_longer_than.map(text));
        let minus = if self.sort.descends() == self.descending {
            ""
        } else {
            "-"
        };
        let sort = format!("{minus}{}", self.sort.as_str());
        put("sort", Some(sort).filter(|sort| sort != "age"));
        put(
            "page",
            Some(self.page.to_string()).filter(|_| self.page > 1),
        );
        put(
            "rows",
            Some(self.rows.to_string()).filter(|_| self.rows != ROWS),
        );
        query.finish()
    }
}

fn one_of(texts: impl Iterator<Item = &'static str>) -> String {
    let texts: Vec<_> = texts.collect();
    format!("one of {}", texts.join(", "))
}

/// `30` and `30s` are seconds; `ms`, `m`, `h` and `d` are what one thinks.
fn duration(text: &str) -> Option<Duration> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let number: f64 = text[..text.len() - unit.len()].parse().ok()?;
    let seconds = match unit.trim() {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" | "min" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * seconds).ok()
}

/// What [`duration`] reads.
pub(super) fn text(time: Duration) -> String {
    format!("{}s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<Query, String> {
        Query::parse(query, &Place::Connections)
    }

    fn filter(query: &str) -> Filter {
        parse(query).unwrap().filter
    }

    #[test]
    fn all_that_can_be_asked_for_is_understood() {
        let all = filter(
            "name=api&direction=in&host=Example&state=idle&older_than=5m&idle_longer_than=500ms\
             &sort=-requests&page=3&rows=10",
        );
        assert_eq!(all.name, Some(Name::Part("api".into())));
        assert_eq!(all.direction, Some(Direction::Inbound));
        assert_eq!(all.host.as_deref(), Some("example"));
        assert_eq!(all.state, Some(ConnectionState::Idle));
        assert_eq!(all.older_than, Some(Duration::from_secs(300)));
        assert_eq!(all.idle_longer_than, Some(Duration::from_millis(500)));
        assert_eq!((all.sort, all.descending), (Sort::Requests, false));
        assert_eq!((all.page, all.rows), (3, 10));
        assert_eq!(filter("name=&state=&sort="), Filter::default());
        let query = parse("format=json&live=1").unwrap();
        assert_eq!((query.format, query.live), (Some(Format::Json), true));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (query, part) in [
            ("state=up", "connecting, new"),
            ("direction=left", "inbound or outbound"),
            ("older_than=soon", "30s"),
            ("older_than=-1", "30s"),
            ("older_than=1e400", "30s"),
            ("sort=luck", "one of age"),
            ("page=0", "from 1"),
            ("rows=100000", "1 to 1000"),
            ("format=xml", "html, json or text"),
            ("nam=api", "nam is not known"),
        ] {
            let error = parse(query).unwrap_err();
            assert!(error.contains(part), "{query}: {error}");
        }
        assert!(parse(&"a".repeat(3_000)).unwrap_err().contains("longer"));
    }

    #[test]
    fn a_click_on_a_head_sorts_and_a_second_one_turns_it_round() {
        let once = filter(&filter("name=a&page=4").sorted_by(Sort::Read));
        assert_eq!(
            (once.sort, once.descending, once.page),
            (Sort::Read, true, 1)
        );
        assert_eq!(once.name, Some(Name::Part("a".into())));
        let twice = filter(&once.sorted_by(Sort::Read));
        assert!(!twice.descending);
        assert!(!filter(&twice.sorted_by(Sort::Host)).descending);
    }

    #[test]
    fn a_view_refuses_what_it_does_not_heed() {
        let refused = |query: &str, place: &Place| Query::parse(query, place).is_err();
        assert!(refused("state=idle", &Place::Closed));
        assert!(!refused("host=a&page=2", &Place::Closed));
        assert!(refused("name=a", &Place::Overview));
        assert!(!refused("format=json", &Place::Overview));
        assert!(!refused("rows=100", &Place::Pools));
    }

    #[test]
    fn a_name_is_a_part_or_with_a_sign_the_whole() {
        let is = |text: &str, name: &str| Name::parse(text).is(name);
        assert!(is("API", "my-api-admin") && is("=api", "api"));
        assert!(!is("=api", "api-admin") && !is("=API", "api"));
    }

    proptest::proptest! {
        #[test]
        fn no_query_is_too_wild(query: String) {
            let _ = parse(&query);
        }

        #[test]
        fn a_filter_says_itself(name in "[ -~]{1,20}", seconds in 0_u64..1_000_000, page in 1_usize..9, sort in 0_usize..10, descending: bool) {
            proptest::prop_assume!(!name.trim().is_empty());
            let filter = Filter {
                name: Some(Name::parse(name.trim())),
                older_than: Some(Duration::from_millis(seconds)),
                sort: Sort::ALL[sort],
                descending,
                page,
                ..Filter::default()
            };
            proptest::prop_assert_eq!(parse(&filter.query()).unwrap().filter, filter);
        }
    }
}
