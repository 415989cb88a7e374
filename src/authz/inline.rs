//! A list whose first items are held without an allocation.

use arrayvec::ArrayVec;

/// Items in order: up to `INLINE` in place, more on the heap.
#[derive(Clone, Debug)]
pub(super) enum InlineVec<T, const INLINE: usize> {
    /// All of few.
    Inline(ArrayVec<T, INLINE>),
    /// All of many.
    Heap(Vec<T>),
}

impl<T, const INLINE: usize> InlineVec<T, INLINE> {
    pub(super) fn push(&mut self, item: T) {
        match self {
            Self::Inline(items) => {
                if let Err(full) = items.try_push(item) {
                    let mut moved: Vec<T> = Vec::with_capacity(2 * INLINE);
                    moved.extend(items.drain(..));
                    moved.push(full.element());
                    *self = Self::Heap(moved);
                }
            }
            Self::Heap(items) => items.push(item),
        }
    }

    pub(super) fn as_slice(&self) -> &[T] {
        match self {
            Self::Inline(items) => items,
            Self::Heap(items) => items,
        }
    }
}

impl<T, const INLINE: usize> Default for InlineVec<T, INLINE> {
    fn default() -> Self {
        Self::Inline(ArrayVec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_stay_in_order_beyond_what_is_held_in_place() {
        let mut list = InlineVec::<usize, 2>::default();
        for item in 0..5 {
            list.push(item);
            let expected: Vec<usize> = (0..=item).collect();
            assert_eq!(list.as_slice(), expected);
        }
    }
}
