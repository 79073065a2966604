//! Where the config comes from. `file`: a file or a directory, watched.

pub mod file;
