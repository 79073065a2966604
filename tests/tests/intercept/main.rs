//! Transparent interception in network namespaces that the tests make: needs root.

mod end_to_end;
mod netns;
mod rules;
