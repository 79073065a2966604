//! Transparent interception in network namespaces that the tests make: needs root.

mod netns;
mod rules;
