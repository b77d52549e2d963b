//! What kind of file it is, and making a component of a core module.

use std::borrow::Cow;

use wasmparser::{Parser, Payload, Validator};
use wit_component::ComponentEncoder;

use crate::error::LoadError;
use crate::load::metadata;

const MAGIC: &[u8; 4] = b"\0asm";
/// Version and layer, two bytes each: core modules are layer 0, components layer 1.
const CORE: [u8; 4] = [1, 0, 0, 0];
/// First byte of a component type and of an instance type, the two that nest.
const NESTING: [u8; 2] = [0x41, 0x42];
/// How often these bytes may occur in one type section. It bounds the nesting, which wasmparser
/// follows by recursion when it reads: 200,000 levels in 600 KB would end the process. Compilers
/// make one section per interface, with a few of either.
const NESTING_MAX: usize = 1000;

pub(crate) fn is_core_module(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC) && bytes.get(4..8) == Some(&CORE)
}

/// The file as a valid component. The whole file is validated before anything is made of it.
pub(crate) fn component_bytes(bytes: &[u8]) -> Result<Cow<'_, [u8]>, LoadError> {
    if !bytes.starts_with(MAGIC) {
        return Err(LoadError::NotWasm(start_of(bytes)));
    }
    validate(bytes)?;
    if Parser::is_component(bytes) {
        return Ok(Cow::Borrowed(bytes));
    }
    metadata::check(bytes)?;
    let encoded = ComponentEncoder::default()
        .module(bytes)
        .and_then(|mut encoder| encoder.encode());
    let component = encoded.map_err(|error| LoadError::NotComponent(format!("{error:#}")))?;
    validate(&component)?;
    Ok(Cow::Owned(component))
}

/// Validates a module or component, all of it.
pub(crate) fn validate(bytes: &[u8]) -> Result<(), LoadError> {
    check_nesting(bytes)?;
    match Validator::new().validate_all(bytes) {
        Ok(_) => Ok(()),
        Err(error) => Err(malformed(&error, bytes)),
    }
}

fn check_nesting(bytes: &[u8]) -> Result<(), LoadError> {
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload.map_err(|error| malformed(&error, bytes))?;
        let Payload::ComponentTypeSection(section) = payload else {
            continue;
        };
        // The parser has checked that the range is inside.
        let section = bytes.get(section.range()).unwrap_or_default();
        let nesting = section.iter().filter(|byte| NESTING.contains(byte)).count();
        if nesting > NESTING_MAX {
            let message = format!(
                "a type section may hold {nesting} nested types; {NESTING_MAX} are allowed"
            );
            return Err(LoadError::Malformed(message));
        }
    }
    Ok(())
}

pub(crate) fn malformed(error: &wasmparser::BinaryReaderError, bytes: &[u8]) -> LoadError {
    LoadError::Malformed(format!(
        "{} at byte {:#x} of {:#x}",
        error.message(),
        error.offset(),
        bytes.len()
    ))
}

fn start_of(bytes: &[u8]) -> String {
    match bytes {
        [] => "the file is empty".to_owned(),
        _ => format!(
            "it begins with \"{}\"",
            bytes[..bytes.len().min(16)].escape_ascii()
        ),
    }
}
