//! The data of the microVM metadata service (MMDS).

use crate::http::Answer;
use serde_json::Value;

/// The data that a guest can read.
pub struct Store {
    /// `None` before the first PUT.
    data: Option<Value>,
    /// The most bytes of the data as text.
    most: usize,
}

impl Store {
    /// One without data, of up to `most` bytes.
    #[must_use]
    pub fn new(most: usize) -> Store {
        Store { data: None, most }
    }

    /// The data; an empty object where there are none.
    #[must_use]
    pub fn get(&self) -> Value {
        let data = self.data.clone().unwrap_or_default();
        match data {
            Value::Null => Value::Object(serde_json::Map::new()),
            data => data,
        }
    }

    /// Whether there are data.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.data.is_some()
    }

    /// Takes these data in place of what is there.
    ///
    /// # Errors
    /// 413 for too many.
    pub fn put(&mut self, data: Value) -> Result<(), Answer> {
        self.fits(&data, "put")?;
        self.data = Some(data);
        Ok(())
    }

    /// Merges these data into what is there (RFC 7396).
    ///
    /// # Errors
    /// 413 for too many, 400 before the first PUT.
    pub fn patch(&mut self, patch: &Value) -> Result<(), Answer> {
        let Some(data) = &self.data else {
            return Err(Answer::fault(NONE));
        };
        let mut merged = data.clone();
        merge(&mut merged, patch);
        self.fits(&merged, "patch")?;
        self.data = Some(merged);
        Ok(())
    }

    fn fits(&self, data: &Value, verb: &str) -> Result<(), Answer> {
        if data.to_string().len() <= self.most {
            return Ok(());
        }
        let why = format!("MMDS limit exceeded error: The MMDS {verb} request doesn't fit.");
        Err(Answer {
            status: 413,
            ..Answer::fault(why)
        })
    }
}

/// What is said where there are no data.
pub(crate) const NONE: &str = "MMDS error: The MMDS data store is not initialized.";

/// Depth is bounded by that of what serde_json reads.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    if let Value::Object(target) = target {
        for (name, value) in patch {
            match value {
                Value::Null => {
                    target.remove(name);
                }
                value => merge(target.entry(name.clone()).or_insert(Value::Null), value),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn data_are_put_merged_and_bounded() {
        let mut store = Store::new(40);
        assert_eq!(store.get(), json!({}));
        assert_eq!(store.patch(&json!({})).map_err(|why| why.status), Err(400));
        store.put(Value::Null).expect("little");
        assert_eq!(store.get(), json!({}));
        store
            .patch(&json!({"a": {"b": 1, "c": 2}}))
            .expect("little");
        store
            .patch(&json!({"a": {"b": null, "d": [1]}, "e": null}))
            .expect("little");
        assert_eq!(store.get(), json!({"a": {"c": 2, "d": [1]}}));
        let much = json!({"x": "y".repeat(40)});
        assert_eq!(store.patch(&much).map_err(|why| why.status), Err(413));
        assert_eq!(store.put(much).map_err(|why| why.status), Err(413));
        assert_eq!(store.get(), json!({"a": {"c": 2, "d": [1]}}));
    }
}
