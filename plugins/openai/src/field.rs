//! A place in a JSON body: its value and its name, so that every complaint says where.

use serde_json::Value;

use crate::visor::plugin::types::{Error, ErrorCode};

/// A value, or the lack of one, and the path to it: `messages[0].content[1].image_url`.
#[derive(Clone, Debug)]
pub(crate) struct Field<'a> {
    pub(crate) path: String,
    /// None when absent or null, which this API does not tell apart.
    value: Option<&'a Value>,
}

impl<'a> Field<'a> {
    /// The body itself, which has to be an object.
    pub(crate) fn body(value: &'a Value) -> Result<Self, Error> {
        let body = Self {
            path: String::new(),
            value: Some(value),
        };
        if value.is_object() {
            Ok(body)
        } else {
            Err(body.wrong_type("a JSON object"))
        }
    }

    /// A member; absent when this is no object.
    pub(crate) fn get(&self, key: &str) -> Self {
        let dot = if self.path.is_empty() { "" } else { "." };
        let value = self
            .value
            .and_then(|value| value.get(key))
            .filter(|value| !value.is_null());
        Self {
            path: format!("{}{dot}{key}", self.path),
            value,
        }
    }

    pub(crate) fn value(&self) -> Option<&'a Value> {
        self.value
    }

    /// This field if it is there.
    pub(crate) fn given(self) -> Option<Self> {
        self.value.is_some().then_some(self)
    }

    pub(crate) fn string(&self) -> Result<&'a str, Error> {
        self.value
            .and_then(Value::as_str)
            .ok_or_else(|| self.wrong_type("a string"))
    }

    pub(crate) fn boolean(&self) -> Result<bool, Error> {
        self.value
            .and_then(Value::as_bool)
            .ok_or_else(|| self.wrong_type("a boolean"))
    }

    pub(crate) fn object(&self) -> Result<&Self, Error> {
        let is_object = self.value.is_some_and(Value::is_object);
        is_object
            .then_some(self)
            .ok_or_else(|| self.wrong_type("an object"))
    }

    /// The elements of an array.
    pub(crate) fn items(&self) -> Result<Vec<Self>, Error> {
        let items = self
            .value
            .and_then(Value::as_array)
            .ok_or_else(|| self.wrong_type("an array"))?;
        let item = |(index, value)| Self {
            path: format!("{}[{index}]", self.path),
            value: Some(value),
        };
        Ok(items.iter().enumerate().map(item).collect())
    }

    /// A number which `fits`; `what` says which ones do.
    pub(crate) fn number(&self, what: &str, fits: impl Fn(f64) -> bool) -> Result<f32, Error> {
        let number = self
            .value
            .and_then(Value::as_f64)
            .ok_or_else(|| self.wrong_type("a number"))?;
        if fits(number) {
            Ok(number as f32)
        } else {
            Err(self.wrong_value(what))
        }
    }

    /// A whole number of at least `least`; beyond u32 it is as good as endless.
    pub(crate) fn count(&self, least: u32) -> Result<u32, Error> {
        let value = self.value.filter(|value| value.is_u64() || value.is_i64());
        let value = value.ok_or_else(|| self.wrong_type("an integer"))?;
        let count = value
            .as_u64()
            .map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        count
            .filter(|count| *count >= least)
            .ok_or_else(|| self.wrong_value(&format!("an integer of at least {least}")))
    }

    /// Of another type than `wanted`, or not there at all.
    pub(crate) fn wrong_type(&self, wanted: &str) -> Error {
        let got = match self.value {
            None => {
                return self.invalid(format!(
                    "Missing required parameter: '{}', {wanted}.",
                    self.path
                ));
            }
            Some(Value::Null) => "null",
            Some(Value::Bool(_)) => "a boolean",
            Some(Value::Number(_)) => "a number",
            Some(Value::String(_)) => "a string",
            Some(Value::Array(_)) => "an array",
            Some(Value::Object(_)) => "an object",
        };
        let of = if self.path.is_empty() {
            "the body".to_owned()
        } else {
            format!("'{}'", self.path)
        };
        self.invalid(format!(
            "Invalid type for {of}: expected {wanted}, but got {got} instead."
        ))
    }

    /// Of the right type, but nothing we can take.
    pub(crate) fn wrong_value(&self, wanted: &str) -> Error {
        self.invalid(format!(
            "Invalid value for '{}': expected {wanted}.",
            self.path
        ))
    }

    pub(crate) fn invalid(&self, message: String) -> Error {
        self.error(ErrorCode::InvalidRequest, message)
    }

    /// Understood, and not to be had here.
    pub(crate) fn unsupported(&self, message: &str) -> Error {
        self.error(
            ErrorCode::Unsupported,
            format!("'{}' is not supported: {message}.", self.path),
        )
    }

    fn error(&self, code: ErrorCode, message: String) -> Error {
        let param = (!self.path.is_empty()).then(|| self.path.clone());
        Error {
            code,
            message,
            param,
            retry_after: None,
        }
    }
}
