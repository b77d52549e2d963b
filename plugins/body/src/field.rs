//! A place in a JSON body: its value and its name, so that every complaint says where.

use serde_json::Value;

use crate::wrong::{Kind, Wrong};

/// Whether a value asks for nothing.
pub type IsNeutral = fn(&Field) -> bool;

/// A value, or the lack of one, and the path to it: `messages[0].content[1].image_url`.
#[derive(Clone, Debug)]
pub struct Field<'a> {
    /// The path to it; empty for the body itself.
    pub path: String,
    /// None when absent or null, which this API does not tell apart.
    value: Option<&'a Value>,
}

impl Field<'_> {
    /// A body as JSON.
    ///
    /// # Errors
    /// A text that is none.
    pub fn json(text: &str) -> Result<Value, Wrong> {
        serde_json::from_str(text).map_err(|error| Wrong {
            kind: Kind::Invalid,
            message: format!("The body is not valid JSON: {error}."),
            param: None,
        })
    }
}

impl<'a> Field<'a> {
    /// The body itself.
    ///
    /// # Errors
    /// A body that is no object.
    pub fn body(value: &'a Value) -> Result<Self, Wrong> {
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
    #[must_use]
    pub fn get(&self, key: &str) -> Self {
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

    /// What is there; none when it is absent or null.
    #[must_use]
    pub fn value(&self) -> Option<&'a Value> {
        self.value
    }

    /// This field if it is there.
    #[must_use]
    pub fn given(self) -> Option<Self> {
        self.value.is_some().then_some(self)
    }

    /// A string.
    ///
    /// # Errors
    /// Anything else, or nothing.
    pub fn string(&self) -> Result<&'a str, Wrong> {
        self.value
            .and_then(Value::as_str)
            .ok_or_else(|| self.wrong_type("a string"))
    }

    /// True or false.
    ///
    /// # Errors
    /// Anything else, or nothing.
    pub fn boolean(&self) -> Result<bool, Wrong> {
        self.value
            .and_then(Value::as_bool)
            .ok_or_else(|| self.wrong_type("a boolean"))
    }

    /// This field, which has to be an object.
    ///
    /// # Errors
    /// Anything else, or nothing.
    pub fn object(&self) -> Result<&Self, Wrong> {
        let is_object = self.value.is_some_and(Value::is_object);
        is_object
            .then_some(self)
            .ok_or_else(|| self.wrong_type("an object"))
    }

    /// The elements of an array.
    ///
    /// # Errors
    /// Anything else, or nothing.
    pub fn items(&self) -> Result<Vec<Self>, Wrong> {
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

    /// The members of an object, by key.
    ///
    /// # Errors
    /// Anything else, or nothing.
    pub fn members(&self) -> Result<Vec<(&'a str, Self)>, Wrong> {
        let members = self.value.and_then(Value::as_object);
        let members = members.ok_or_else(|| self.wrong_type("an object"))?;
        let named = members.iter();
        Ok(named
            .map(|(key, _)| (key.as_str(), self.get(key)))
            .collect())
    }

    /// A number which `fits`; `what` says which ones do.
    ///
    /// # Errors
    /// Anything else, or nothing.
    pub fn number(&self, what: &str, fits: impl Fn(f64) -> bool) -> Result<f32, Wrong> {
        let number = self
            .value
            .and_then(Value::as_f64)
            .ok_or_else(|| self.wrong_type("a number"))?;
        if fits(number) {
            // What f32 has no room for is as much as it has: an infinity would be no number any more.
            Ok((number as f32).clamp(f32::MIN, f32::MAX))
        } else {
            Err(self.wrong_value(what))
        }
    }

    /// A whole number of at least `least`; beyond u32 it is as good as endless. 1.0 is one, too: JSON has one
    /// kind of numbers.
    ///
    /// # Errors
    /// Anything else, or nothing.
    pub fn count(&self, least: u32) -> Result<u32, Wrong> {
        let float = self.whole()?;
        let exact = self.value.and_then(Value::as_u64);
        let count = exact.or_else(|| (float >= 0.0).then_some(float as u64));
        count
            .map(|count| u32::try_from(count).unwrap_or(u32::MAX))
            .filter(|count| *count >= least)
            .ok_or_else(|| self.wrong_value(&format!("an integer of at least {least}")))
    }

    /// A whole number as far as a float tells it: one that is written as a float is none for certain beyond 2^53.
    fn whole(&self) -> Result<f64, Wrong> {
        let certain =
            |number: f64| number.fract() == 0.0 && number.abs() <= 9_007_199_254_740_992.0;
        let number = self.value.and_then(Value::as_f64);
        let value = self
            .value
            .filter(|value| value.is_u64() || value.is_i64() || number.is_some_and(certain));
        if value.is_none() && number.is_some_and(|number| number.fract() == 0.0) {
            return Err(self.wrong_value("an integer of 64 bits"));
        }
        value
            .and_then(Value::as_f64)
            .ok_or_else(|| self.wrong_type("an integer"))
    }

    /// This flag; false when it is absent.
    ///
    /// # Errors
    /// What is neither true nor false.
    pub fn flag(&self) -> Result<bool, Wrong> {
        self.clone()
            .given()
            .map_or(Ok(false), |field| field.boolean())
    }

    /// This string, if it is there.
    ///
    /// # Errors
    /// What is no string.
    pub fn text(&self) -> Result<Option<String>, Wrong> {
        let field = self.clone().given();
        field.map(|f| f.string().map(str::to_owned)).transpose()
    }

    /// This whole number of at least `least`, if it is there.
    ///
    /// # Errors
    /// What is no such number.
    pub fn optional_count(&self, least: u32) -> Result<Option<u32>, Wrong> {
        let field = self.clone().given();
        field.map(|field| field.count(least)).transpose()
    }

    /// This whole number from 0 to `most`, if it is there: alternatives to a token.
    ///
    /// # Errors
    /// What is no such number.
    pub fn optional_count_to(&self, most: u8) -> Result<Option<u8>, Wrong> {
        let Some(count) = self.optional_count(0)? else {
            return Ok(None);
        };
        let fitting = u8::try_from(count).ok().filter(|count| *count <= most);
        let fitting =
            fitting.ok_or_else(|| self.wrong_value(&format!("an integer from 0 to {most}")));
        fitting.map(Some)
    }

    /// This number, if it is there; as [`Self::number`].
    ///
    /// # Errors
    /// What is no number, or does not fit.
    pub fn optional_number(
        &self,
        what: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f32>, Wrong> {
        let field = self.clone().given();
        field.map(|field| field.number(what, fits)).transpose()
    }

    /// One string that is not empty, or at most `most` of them in an array.
    ///
    /// # Errors
    /// Anything else.
    pub fn strings(&self, most: usize) -> Result<Vec<String>, Wrong> {
        let strings = match self.value {
            None => return Ok(Vec::new()),
            Some(Value::String(_)) => vec![self.clone()],
            Some(Value::Array(_)) => self.items()?,
            Some(_) => return Err(self.wrong_type("a string or an array of strings")),
        };
        if strings.len() > most {
            return Err(self.wrong_value(&format!("at most {most} strings")));
        }
        let string = |field: &Self| match field.string()? {
            "" => Err(field.wrong_value("a string that is not empty")),
            text => Ok(text.to_owned()),
        };
        strings.iter().map(string).collect()
    }

    /// Any 64-bit integer, if it is there; negative ones are as good as others.
    ///
    /// # Errors
    /// What is no such integer.
    pub fn seed(&self) -> Result<Option<u64>, Wrong> {
        let Some(field) = self.clone().given() else {
            return Ok(None);
        };
        let float = field.whole()?;
        let value = field.value;
        let unsigned = value.and_then(Value::as_u64);
        let signed = value.and_then(Value::as_i64).unwrap_or(float as i64);
        Ok(Some(unsigned.unwrap_or_else(|| signed.cast_unsigned())))
    }

    /// Refuses members that would change the answer and cannot be honoured: better than to ignore
    /// them. Each comes with why, and with the values that ask for nothing.
    ///
    /// # Errors
    /// The first of them that asks for something.
    pub fn refuse(&self, table: &[(&str, &str, IsNeutral)]) -> Result<(), Wrong> {
        for (key, message, is_neutral) in table {
            if let Some(field) = self.get(key).given().filter(|field| !is_neutral(field)) {
                return Err(field.unsupported(message));
            }
        }
        Ok(())
    }

    /// Whether this is false.
    #[must_use]
    pub fn is_false(&self) -> bool {
        self.value == Some(&Value::Bool(false))
    }

    /// Whether this is one of these words.
    #[must_use]
    pub fn is_one_of(&self, words: &[&str]) -> bool {
        self.string().is_ok_and(|word| words.contains(&word))
    }

    /// Whether this is a string, an array or an object with nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self.value {
            Some(Value::String(text)) => text.is_empty(),
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(members)) => members.is_empty(),
            _ => false,
        }
    }

    /// Of another type than `wanted`, or not there at all.
    #[must_use]
    pub fn wrong_type(&self, wanted: &str) -> Wrong {
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
    #[must_use]
    pub fn wrong_value(&self, wanted: &str) -> Wrong {
        self.invalid(format!(
            "Invalid value for '{}': expected {wanted}.",
            self.path
        ))
    }

    /// At fault, for the reason that `message` gives.
    #[must_use]
    pub fn invalid(&self, message: String) -> Wrong {
        self.wrong(Kind::Invalid, message)
    }

    /// Understood, and not to be had here.
    #[must_use]
    pub fn unsupported(&self, message: &str) -> Wrong {
        self.wrong(
            Kind::Unsupported,
            format!("'{}' is not supported: {message}.", self.path),
        )
    }

    fn wrong(&self, kind: Kind, message: String) -> Wrong {
        let param = (!self.path.is_empty()).then(|| self.path.clone());
        Wrong {
            kind,
            message,
            param,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_number_stays_one_in_fewer_bits() {
        let body = json!({ "n": -1e300, "m": 1e300 });
        let number = |name| {
            Field::body(&body)
                .unwrap()
                .get(name)
                .number("any", |_| true)
        };
        assert_eq!((number("n"), number("m")), (Ok(f32::MIN), Ok(f32::MAX)));
    }

    #[test]
    fn a_whole_number_may_have_a_point() {
        let count = |value: Value| {
            Field::body(&json!({ "n": value }))
                .unwrap()
                .get("n")
                .count(1)
        };
        let seed = |value: Value| Field::body(&json!({ "n": value })).unwrap().get("n").seed();
        assert_eq!((count(json!(2)), count(json!(2.0))), (Ok(2), Ok(2)));
        assert_eq!(
            (count(json!(5e9)), count(json!(u64::MAX))),
            (Ok(u32::MAX), Ok(u32::MAX))
        );
        assert_eq!(seed(json!(7.0)), Ok(Some(7)));
        assert_eq!(seed(json!(-1.0)), Ok(Some(u64::MAX)));
        assert_eq!(seed(json!(i64::MIN)), Ok(Some(1 << 63)));
        for wrong in [
            json!(1.5),
            json!(0),
            json!(-3.0),
            json!(1e30),
            json!("1"),
            json!(true),
        ] {
            assert!(count(wrong.clone()).is_err(), "{wrong}");
        }
        let says = |value: Value| seed(value).unwrap_err().message;
        assert!(says(json!(1.5)).contains("got a number"));
        assert!(says(json!("7")).contains("got a string"));
        for large in [json!(1e30), json!(18_446_744_073_709_551_616_f64)] {
            assert!(says(large).ends_with("expected an integer of 64 bits."));
        }
    }
}
