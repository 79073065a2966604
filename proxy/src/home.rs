//! Which thread something belongs to.
//!
//! Wakers may be called from anywhere, and nearly always are from the worker they belong to: there
//! nothing runs beside them, so flags need no order between them.

thread_local! {
    /// Its address is another one on every thread that runs.
    static MARK: u8 = const { 0 };
}

/// The thread that something belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Home(usize);

impl Home {
    /// This thread.
    pub fn here() -> Self {
        Self(MARK.with(|mark| std::ptr::from_ref(mark).addr()))
    }

    /// Whether it is this thread.
    pub fn is_here(self) -> bool {
        self == Self::here()
    }
}
