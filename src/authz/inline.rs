//! A list whose first items are held without an allocation.

use arrayvec::ArrayVec;

/// Items in order: the first `INLINE` in place, the others on the heap.
#[derive(Clone, Debug)]
pub(super) struct InlineVec<T, const INLINE: usize> {
    inline: ArrayVec<T, INLINE>,
    rest: Vec<T>,
}

impl<T, const INLINE: usize> InlineVec<T, INLINE> {
    pub(super) fn push(&mut self, item: T) {
        if let Err(full) = self.inline.try_push(item) {
            self.rest.push(full.element());
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.inline.len() + self.rest.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.inline.iter().chain(&self.rest)
    }
}

impl<T, const INLINE: usize> Default for InlineVec<T, INLINE> {
    fn default() -> Self {
        Self {
            inline: ArrayVec::new(),
            rest: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_stay_in_order_beyond_what_is_held_in_place() {
        let mut list = InlineVec::<usize, 2>::default();
        for item in 0..5 {
            assert_eq!(list.len(), item);
            list.push(item);
        }
        assert!(list.iter().copied().eq(0..5));
    }
}
