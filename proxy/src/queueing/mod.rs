//! Calls that become messages: accepting them, telling about them, delivering them.
//!
//! Traffic, not storage: the store is `outrigger-queue`. Stands on the life of a message.
//!
//! In reading order: [`accept`] turns a call into a message and answers 202, or says why it did
//! not ([`skip`]). [`dispatch`] leases messages within what [`target`] allows, and [`delivery`]
//! sends each of them through `forward` again. [`status`] and [`operations`] tell the [`caller`] and [`inspect`] the
//! operator; [`callback`] tells whom the caller named, [`events`] whom the operator did. [`store`] owns the store of this sidecar; [`convert`], [`unary`] and [`text`] are
//! the pure parts.

pub mod accept;
mod audit;
pub mod callback;
pub mod caller;
pub mod convert;
mod deaths;
pub mod delivery;
pub mod dispatch;
mod events;
pub mod export;
mod fan_out;
mod faults;
mod groups;
pub mod inspect;
mod letters;
mod lookup;
pub mod operations;
pub mod ordering;
mod original;
pub mod reading;
mod receipt;
mod replay;
pub mod shadow;
pub mod skip;
pub mod status;
pub mod store;
pub mod target;
pub mod text;
pub mod unary;
