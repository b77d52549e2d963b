//! Typed look-ups in a JSON object, with errors that name the key, what it holds and what it may hold.

use serde_json::{Map, Value};

use crate::error::ModelError;

/// One JSON object of a config file. Unknown keys are never looked at: converters add them freely.
pub(crate) struct Keys<'a> {
    object: &'a Map<String, Value>,
    file: &'a str,
    prefix: String,
}

impl<'a> Keys<'a> {
    /// The top level of `file`.
    pub(crate) fn new(value: &'a Value, file: &'a str) -> Result<Self, ModelError> {
        match value {
            Value::Object(object) => Ok(Self {
                object,
                file,
                prefix: String::new(),
            }),
            other => Err(ModelError::Config {
                file: file.to_owned(),
                message: format!("holds {}, want a JSON object", brief(other)),
            }),
        }
    }

    /// The value at `key`; JSON null counts as absent.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// The object at `key`.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Keys<'a>>, ModelError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Keys {
                object,
                file: self.file,
                prefix: format!("{}{key}.", self.prefix),
            })),
            Some(other) => Err(self.wrong(key, &brief(other), "an object")),
        }
    }

    /// The text at `key`.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, &brief(other), "text")),
        }
    }

    /// The flag at `key`.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(key, &brief(other), "true or false")),
        }
    }

    /// A size from 1 to `max` at `key`.
    pub(crate) fn size(&self, key: &str, max: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        match size {
            Some(size) if (1..=max).contains(&size) => Ok(Some(size)),
            _ => Err(self.wrong(
                key,
                &brief(value),
                &format!("a whole number from 1 to {max}"),
            )),
        }
    }

    /// A size from 1 to `max` that has to be there.
    pub(crate) fn size_needed(&self, key: &str, max: usize) -> Result<usize, ModelError> {
        self.size(key, max)?
            .ok_or_else(|| self.wrong(key, "nothing", &format!("a whole number from 1 to {max}")))
    }

    /// A whole number of either sign at `key`.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<i64>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        value
            .as_i64()
            .map(Some)
            .ok_or_else(|| self.wrong(key, &brief(value), "a whole number"))
    }

    /// A finite number above zero at `key`.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
            _ => Err(self.wrong(key, &brief(value), "a number above 0")),
        }
    }

    /// `count` finite numbers above zero at `key`, as f32.
    pub(crate) fn positives(&self, key: &str, count: usize) -> Result<Vec<f32>, ModelError> {
        let want = format!("a list of {count} numbers above 0");
        let list = match self.value(key) {
            Some(Value::Array(list)) => list,
            Some(other) => return Err(self.wrong(key, &brief(other), &want)),
            None => return Err(self.wrong(key, "nothing", &want)),
        };
        let numbers: Vec<f32> = list
            .iter()
            .filter_map(Value::as_f64)
            .map(|number| number as f32)
            .filter(|number| number.is_finite() && *number > 0.0)
            .collect();
        if list.len() != count || numbers.len() != count {
            let have = format!(
                "{} entries, {} of them such numbers",
                list.len(),
                numbers.len()
            );
            return Err(self.wrong(key, &have, &want));
        }
        Ok(numbers)
    }

    /// One token id or a list of them at `key`.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let values = match self.value(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().collect(),
            Some(value) => vec![value],
        };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        values
            .into_iter()
            .map(|value| {
                id(value)
                    .ok_or_else(|| self.wrong(key, &brief(value), "a token id or a list of them"))
            })
            .collect()
    }

    /// The error for a key that holds something else than it should.
    pub(crate) fn wrong(&self, key: &str, have: &str, want: &str) -> ModelError {
        ModelError::Config {
            file: self.file.to_owned(),
            message: format!("{}{key} holds {have}, want {want}", self.prefix),
        }
    }
}

/// A JSON value short enough for an error message.
pub(crate) fn brief(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_owned(),
        other => {
            let text = other.to_string();
            match text.char_indices().nth(40) {
                Some((end, _)) => format!("{}...", &text[..end]),
                None => text,
            }
        }
    }
}
