//! The limit as a `reqwest-middleware`.

use reqwest::{Request, Response};
use reqwest_middleware::{Error, Middleware, Next};

use super::key::UrlRef;
use super::shell::Begun;
use super::{InFlightLimit, hold_place};

#[async_trait::async_trait]
impl Middleware for InFlightLimit {
    async fn handle(
        &self,
        request: Request,
        extensions: &mut http::Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<Response> {
        let place = match self.enter(UrlRef::Reqwest(request.url())) {
            None => None,
            Some(Begun::Goes(place)) => Some(place),
            Some(Begun::Waits(waiting)) => Some(waiting.await.map_err(Error::middleware)?),
            Some(Begun::Refused(error)) => return Err(Error::middleware(error)),
        };
        let response = next.run(request, extensions).await?;
        Ok(hold_place(response, place))
    }
}
