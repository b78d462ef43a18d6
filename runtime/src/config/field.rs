// SPDX-License-Identifier: Apache-2.0
//! Types of the configuration's values.

use std::path::PathBuf;

use bulkhead_ksm_throttler::group::{BadName, Name};
use bulkhead_vmm_api::Pages;
use serde::Deserialize as _;
use toml::Value;

use super::LogLevel;

/// Something that a key can hold.
pub trait Field {
    /// As TOML.
    fn show(&self) -> Value;

    /// Takes a value over.
    ///
    /// # Errors
    /// What is wrong with it.
    fn put(&mut self, value: &Value) -> Result<(), String>;
}

fn expected(what: &str, value: &Value) -> String {
    format!("expected {what}, found {value}")
}

fn text(value: &Value) -> Result<&str, String> {
    value
        .as_str()
        .ok_or_else(|| expected("a text in quotes", value))
}

fn texts(value: &Value) -> Result<Vec<&str>, String> {
    let array = value
        .as_array()
        .ok_or_else(|| expected("a list of texts", value))?;
    array.iter().map(text).collect()
}

macro_rules! number {
    ($($type:ty)+) => {$(
        impl Field for $type {
            fn show(&self) -> Value {
                // A key's bounds end far below this.
                Value::Integer(i64::try_from(*self).unwrap_or(i64::MAX))
            }

            fn put(&mut self, value: &Value) -> Result<(), String> {
                let number = value
                    .as_integer()
                    .ok_or_else(|| expected("a whole number", value))?;
                *self = number
                    .try_into()
                    .map_err(|_| format!("{number} is too large or too small"))?;
                Ok(())
            }
        }
    )+};
}

number!(u8 u32 u64 usize);

impl Field for bool {
    fn show(&self) -> Value {
        Value::Boolean(*self)
    }

    fn put(&mut self, value: &Value) -> Result<(), String> {
        *self = value
            .as_bool()
            .ok_or_else(|| expected("true or false", value))?;
        Ok(())
    }
}

impl Field for String {
    fn show(&self) -> Value {
        Value::String(self.clone())
    }

    fn put(&mut self, value: &Value) -> Result<(), String> {
        *self = text(value)?.to_owned();
        Ok(())
    }
}

impl Field for PathBuf {
    fn show(&self) -> Value {
        Value::String(self.to_string_lossy().into_owned())
    }

    fn put(&mut self, value: &Value) -> Result<(), String> {
        let path = Self::from(text(value)?);
        if !path.is_absolute() {
            return Err(format!("{path:?} is not an absolute path"));
        }
        *self = path;
        Ok(())
    }
}

impl Field for LogLevel {
    fn show(&self) -> Value {
        Value::String(tracing::Level::from(*self).as_str().to_lowercase())
    }

    fn put(&mut self, value: &Value) -> Result<(), String> {
        let name = text(value)?;
        *self = Self::deserialize(value.clone())
            .map_err(|_| format!("{name:?} is none of: error, warn, info, debug, trace"))?;
        Ok(())
    }
}

impl Field for Pages {
    fn show(&self) -> Value {
        Value::String(self.name().into())
    }

    fn put(&mut self, value: &Value) -> Result<(), String> {
        let name = text(value)?;
        let mut all = Self::ALL.into_iter();
        *self = all.find(|pages| pages.name() == name).ok_or_else(|| {
            format!(
                "{name:?} is none of: {}",
                Self::ALL.map(Self::name).join(", ")
            )
        })?;
        Ok(())
    }
}

impl Field for Option<Name> {
    fn show(&self) -> Value {
        Value::String(self.as_ref().map_or_else(String::new, Name::to_string))
    }

    fn put(&mut self, value: &Value) -> Result<(), String> {
        *self = match text(value)? {
            "" => None,
            name => Some(name.parse().map_err(|error: BadName| error.to_string())?),
        };
        Ok(())
    }
}

impl Field for Vec<Name> {
    fn show(&self) -> Value {
        Value::Array(
            self.iter()
                .map(|name| Value::String(name.to_string()))
                .collect(),
        )
    }

    fn put(&mut self, value: &Value) -> Result<(), String> {
        *self = texts(value)?
            .into_iter()
            .map(|name| name.parse().map_err(|error: BadName| error.to_string()))
            .collect::<Result<_, _>>()?;
        Ok(())
    }
}

impl Field for Vec<String> {
    fn show(&self) -> Value {
        Value::Array(self.iter().cloned().map(Value::String).collect())
    }

    fn put(&mut self, value: &Value) -> Result<(), String> {
        *self = texts(value)?.into_iter().map(str::to_owned).collect();
        Ok(())
    }
}
