//! The live page as curl and programs see it. (What a browser sees is in `inspect_browser`.)
#![allow(clippy::unwrap_used)]

mod support;

mod inspect {
    mod actions;
    mod ask;
    mod connections;
    mod pools;
    mod safety;
    mod served;
    mod text;
}
