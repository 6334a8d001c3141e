//! What an operator can do from the page, where the code allows it.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::runtime::Handle;

use crate::event::{CloseReason, ConnectionId, ConnectionState, Direction};
use crate::inspect::Inspector;
use crate::inspect::guard::{Refusal, refuse};
use crate::record::Connection;

/// How long a drain lasts at most, if nothing else is said.
const DRAIN: Duration = Duration::from_secs(30);

const BY_OPERATOR: CloseReason = CloseReason::OperatorRequest;

/// What a form asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Close(ConnectionId),
    CloseIdle(Whose),
    Drain {
        listener: String,
        deadline: Duration,
    },
}

/// Whose idle connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    Pool(String),
    Scope(Direction, String),
}

/// What was done, in words, and where to look at it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) text: String,
    pub(super) see: String,
}

impl Action {
    /// `of` is the last part of the path; the body is a form's.
    pub(super) fn parse(of: &str, body: &[u8]) -> Result<(Self, String), Refusal> {
        let bad = |text: String| Err(refuse(StatusCode::BAD_REQUEST, text));
        let (mut token, mut id, mut name, mut pool) = (String::new(), None, None, None);
        let (mut direction, mut deadline) = (None, DRAIN);
        for (key, value) in form_urlencoded::parse(body) {
            match &*key {
                "token" => token = value.into_owned(),
                "id" => id = parse_id(&value),
                "name" | "listener" => name = Some(value.into_owned()),
                "pool" => pool = Some(value.into_owned()),
                "direction" => {
                    direction = match &*value {
                        "inbound" => Some(Direction::Inbound),
                        "outbound" => Some(Direction::Outbound),
                        _ => return bad(format!("direction = {value:?}: inbound or outbound")),
                    }
                }
                "deadline" => match value.trim_end_matches('s').parse() {
                    Ok(seconds @ 0..=3_600) => deadline = Duration::from_secs(seconds),
                    _ => return bad(format!("deadline = {value:?}: seconds, at most 3600")),
                },
                _ => return bad(format!("{key} is not known")),
            }
        }
        let action = match (of, id, name, pool, direction) {
            ("close", Some(id), None, None, None) => Self::Close(id),
            ("close-idle", None, None, Some(pool), None) => Self::CloseIdle(Whose::Pool(pool)),
            ("close-idle", None, Some(name), None, Some(direction)) => {
                Self::CloseIdle(Whose::Scope(direction, name))
            }
            ("drain", None, Some(listener), None, None) => Self::Drain { listener, deadline },
            ("close", ..) => return bad("close needs id".into()),
            ("close-idle", ..) => return bad("close-idle needs pool, or name and direction".into()),
            ("drain", ..) => return bad("drain needs listener".into()),
            _ => {
                return Err(refuse(
                    StatusCode::NOT_FOUND,
                    "close, close-idle and drain are there",
                ));
            }
        };
        Ok((action, token))
    }
}

pub(super) fn parse_id(text: &str) -> Option<ConnectionId> {
    let (instance, number) = text.split_once('-')?;
    let id = ConnectionId {
        instance: u32::from_str_radix(instance, 16).ok()?,
        number: number.parse().ok()?,
    };
    // Only as we write it.
    (id.to_string() == text).then_some(id)
}

impl Inspector {
    /// Not within a runtime: a pool would take it for its own. `runtime` is for a drain, which waits.
    pub(super) fn act(&self, action: Action, runtime: &Handle) -> Result<Done, Refusal> {
        let gone = |text: String| refuse(StatusCode::NOT_FOUND, text);
        match action {
            Action::Close(id) => {
                let found = self.recorder.find_connection(id);
                let open = found.filter(|connection| connection.closed.get().is_none());
                let connection =
                    open.ok_or_else(|| gone(format!("connection {id} is not open")))?;
                if !close(&connection) {
                    let text = "this connection can't be closed from outside: it is no TCP socket of \
                                ours, or in other hands";
                    return Err(refuse(StatusCode::CONFLICT, text));
                }
                Ok(Done {
                    text: format!("connection {id} is shut down"),
                    see: format!("/connections/{id}"),
                })
            }
            Action::CloseIdle(Whose::Pool(name)) => {
                let pools = self.recorder.live_pools().into_iter();
                let closed = pools
                    .filter(|pool| *pool.stats().name == *name)
                    .filter(|pool| Arc::clone(pool).close_idle(BY_OPERATOR))
                    .count();
                if closed == 0 {
                    return Err(gone(format!(
                        "no pool {name:?} whose connections can be closed"
                    )));
                }
                Ok(Done {
                    text: format!("what was idle in {name:?} is closed"),
                    see: "/pools".into(),
                })
            }
            Action::CloseIdle(Whose::Scope(direction, name)) => {
                let closed = self.close_idle_of(direction, &name);
                Ok(Done {
                    text: format!("{closed} idle connections of {name:?} are closed"),
                    see: String::new(),
                })
            }
            Action::Drain { listener, deadline } => {
                let doors = self.recorder.listeners().all();
                let doors: Vec<_> = doors
                    .into_iter()
                    .filter(|door| *door.scope().name == *listener && !door.is_draining())
                    .collect();
                if doors.is_empty() {
                    return Err(gone(format!("no listener {listener:?} that is open")));
                }
                for door in doors {
                    // Its report is in the counts: what was cut, was closed by `drain_deadline`.
                    runtime.spawn(door.drain(deadline));
                }
                Ok(Done {
                    text: format!("{listener:?} drains, for {deadline:?} at most"),
                    see: String::new(),
                })
            }
        }
    }

    fn close_idle_of(&self, direction: Direction, name: &str) -> usize {
        let pools = self.recorder.live_pools().into_iter();
        let own =
            pools.filter(|pool| direction == Direction::Outbound && *pool.stats().name == *name);
        // A pool closes its own without a race.
        let mut closed = 0;
        for pool in own {
            let idle = pool.stats().idle as usize;
            if pool.close_idle(BY_OPERATOR) {
                closed += idle;
            }
        }
        if closed > 0 {
            return closed;
        }
        let mut idle = Vec::new();
        for scope in self.recorder.scopes() {
            if scope.direction == direction && *scope.name == *name {
                scope.each_connection(|connection| {
                    if connection.state() == ConnectionState::Idle {
                        idle.push(connection.clone());
                    }
                });
            }
        }
        // Out of the locks: it asks the kernel.
        idle.retain(|connection| connection.state() == ConnectionState::Idle && close(connection));
        idle.len()
    }
}

/// Shuts the socket down in both directions, so that whoever has it learns that it is over.
fn close(connection: &Connection) -> bool {
    if !connection.socket.can_shut_down() {
        return false;
    }
    connection.cut(BY_OPERATOR);
    connection.poison();
    connection.socket.shut_down();
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_asks_for_one_thing_and_names_it() {
        let id = ConnectionId::from_parts(0x5f3a, 42);
        let parse = |of: &str, body: &str| {
            Action::parse(of, body.as_bytes()).map_err(|refusal| refusal.status.as_u16())
        };
        let ok = |action, token: &str| Ok((action, token.to_owned()));
        assert_eq!(
            parse("close", "token=t&id=00005f3a-42"),
            ok(Action::Close(id), "t")
        );
        let whose = Whose::Scope(Direction::Inbound, "a b".into());
        assert_eq!(
            parse("close-idle", "name=a+b&direction=inbound"),
            ok(Action::CloseIdle(whose), "")
        );
        let drain = Action::Drain {
            listener: "http".into(),
            deadline: Duration::from_secs(5),
        };
        assert_eq!(parse("drain", "listener=http&deadline=5s"), ok(drain, ""));
        for (of, body) in [
            ("close", "id=5f3a-42"),
            ("close", "id=00005f3a-042"),
            ("close", ""),
            ("close-idle", "name=a"),
            ("close-idle", "name=a&direction=up"),
            ("drain", "deadline=5"),
            ("drain", "listener=a&deadline=99999999"),
            ("drain", "listener=a&more=b"),
        ] {
            assert_eq!(parse(of, body), Err(400), "{of} {body}");
        }
        assert_eq!(parse("format", ""), Err(404));
    }
}
