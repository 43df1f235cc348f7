//! A map of objects that is cheap to clone: the clone shares all objects until one of the two changes them.

use imbl::{OrdMap, ordmap::DiffItem};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::MapAccess, de::Visitor};
use std::{fmt, marker::PhantomData, sync::Arc};

/// Objects by id, in the order of their ids.
#[derive(Debug, Clone, PartialEq)]
pub struct Table<K: Ord + Clone, V>(OrdMap<K, Arc<V>>);

impl<K: Ord + Clone, V> Default for Table<K, V> {
    fn default() -> Self {
        Self(OrdMap::new())
    }
}

impl<K: Ord + Clone, V: Clone> Table<K, V> {
    /// The object of this id.
    #[must_use]
    pub fn get(&self, id: &K) -> Option<&V> {
        self.0.get(id).map(Arc::as_ref)
    }

    /// The object of this id, to change it. A shared object is copied first.
    pub fn get_mut(&mut self, id: &K) -> Option<&mut V> {
        self.0.get_mut(id).map(Arc::make_mut)
    }

    /// Adds an object or replaces the one of the same id.
    pub fn insert(&mut self, id: K, value: V) {
        self.0.insert(id, Arc::new(value));
    }

    /// Takes an object out.
    pub fn remove(&mut self, id: &K) -> Option<Arc<V>> {
        self.0.remove(id)
    }

    /// How many objects there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the id exists.
    #[must_use]
    pub fn contains(&self, id: &K) -> bool {
        self.0.contains_key(id)
    }

    /// Ids and objects by ascending id.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.0.iter().map(|(id, value)| (id, value.as_ref()))
    }

    /// Objects by ascending id.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> {
        self.0.iter().map(|(_, value)| value.as_ref())
    }

    /// Hands over what differs in another table: the id, the object here and the object there. What both share since one was cloned
    /// from the other is passed over.
    pub(crate) fn changes(&self, other: &Self, mut change: impl FnMut(&K, Option<&V>, Option<&V>))
    where
        V: PartialEq,
    {
        if self.0.ptr_eq(&other.0) {
            return;
        }
        for item in self.0.diff(&other.0) {
            match item {
                DiffItem::Add(id, new) => change(id, None, Some(new)),
                DiffItem::Update { old: (id, old), new: (_, new) } => change(id, Some(old), Some(new)),
                DiffItem::Remove(id, old) => change(id, Some(old), None),
            }
        }
    }

    /// Ids in ascending order.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> {
        self.0.keys()
    }
}

impl<K: Ord + Clone + Serialize, V: Serialize> Serialize for Table<K, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(id, value)| (id, value.as_ref())))
    }
}

impl<'de, K, V> Deserialize<'de> for Table<K, V>
where
    K: Ord + Clone + Deserialize<'de>,
    V: Deserialize<'de>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<K, V>(PhantomData<(K, V)>);

        impl<'de, K, V> Visitor<'de> for Entries<K, V>
        where
            K: Ord + Clone + Deserialize<'de>,
            V: Deserialize<'de>,
        {
            type Value = Table<K, V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of objects by id")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
                let mut map = OrdMap::new();
                while let Some((id, value)) = entries.next_entry::<K, V>()? {
                    map.insert(id, Arc::new(value));
                }
                Ok(Table(map))
            }
        }

        deserializer.deserialize_map(Entries(PhantomData))
    }
}
