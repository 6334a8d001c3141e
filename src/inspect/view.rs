//! What the page shows, as plain data: the one model behind HTML, text and JSON.
//!
//! As JSON it is an interface. [`VERSION`] grows when a field changes its meaning or goes; fields may be
//! added without. Times are in seconds, moments in seconds since 1970; what is not known is `null`.

use std::time::SystemTime;

use serde::Serialize;

use crate::event::TraceRef;

mod connections;
mod overview;
mod pools;

pub(super) use self::{
    connections::{Closed, Connections, One, Row},
    overview::{Bucket, Count, Family, Overview, PoolTrend},
    pools::{Holder, Pool, PoolKeyView, PoolRow, Pools},
};

/// The version of the JSON.
pub(super) const VERSION: u32 = 1;

/// An answer.
#[derive(Serialize)]
pub(super) struct Page<'a> {
    pub(super) version: u32,
    pub(super) title: &'a str,
    pub(super) generated: f64,
    #[serde(flatten)]
    pub(super) view: View,
}

#[derive(Serialize)]
#[serde(tag = "view", rename_all = "snake_case")]
pub(super) enum View {
    Overview(Overview),
    Connections(Connections),
    Connection(Box<One>),
    Pools(Pools),
    Closed(Closed),
}

// === traces ===

/// Where traces can be seen.
pub(super) struct Link<'a>(pub(super) Option<&'a str>);

#[derive(Serialize)]
pub(super) struct TraceView {
    pub(super) trace_id: String,
    pub(super) span_id: String,
    pub(super) sampled: bool,
    /// Only of one that is sampled: others are nowhere.
    pub(super) link: Option<String>,
}

impl TraceView {
    fn new(trace: TraceRef, link: &Link<'_>) -> Self {
        let hex = |bytes: &[u8]| {
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        let (trace_id, span_id) = (hex(&trace.trace_id), hex(&trace.span_id));
        let link = link.0.filter(|_| trace.sampled).map(|template| {
            let filled = template.replace("{trace_id}", &trace_id);
            filled.replace("{span_id}", &span_id)
        });
        Self {
            trace_id,
            span_id,
            sampled: trace.sampled,
            link,
        }
    }
}

pub(super) fn unix(time: SystemTime) -> f64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}
