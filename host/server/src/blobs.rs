//! Lifts the bulk out of a JSON body, so that megabytes of base64 never enter a plugin.
//!
//! One pass over the bytes, without recursion and without building a tree. A string *value* longer
//! than `lift_bytes_min` that is base64 or a data URL is decoded and replaced by `<marker>:<n>`;
//! every other byte of the body is kept as it came, so the adapter's own parser sees (and judges)
//! exactly what the client wrote. This room knows JSON's lexical rules and nothing of any dialect.

use bytes::Bytes;
use rand::RngCore;

use crate::images::data_url;

/// Bounds on one body.
#[derive(Debug, Clone, Copy)]
pub struct LiftLimits {
    /// Strings of at most this many bytes stay where they are.
    pub lift_bytes_min: usize,
    /// Most brackets open at once.
    pub depth_max: usize,
    /// Most values in a JSON body, members and elements together.
    pub values_max: usize,
    /// Most strings lifted from one body.
    pub blobs_max: usize,
    /// Most bytes of text left for the adapter.
    pub text_bytes_max: usize,
}

/// One string that was taken out.
#[derive(Debug, Clone)]
pub struct LiftedBlob {
    /// The decoded bytes. A data URL that cannot be decoded is kept as its own text, so that
    /// whoever wants the bytes later can say what is wrong with it.
    pub bytes: Bytes,
    /// From the data URL, else from the leading bytes.
    pub content_type: String,
    /// The string itself, unescaped, for putting it back where it was only text after all.
    pub original: Bytes,
}

/// A body without its bulk.
#[derive(Debug, Clone)]
pub struct Lifted {
    /// The body, long strings replaced by tokens.
    pub text: String,
    /// The random word that tokens of this body begin with.
    pub marker: String,
    /// What the tokens stand for, by number.
    pub blobs: Vec<LiftedBlob>,
}

/// Why a body was refused before any plugin saw it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LiftError {
    /// Not text.
    #[error("the body is not UTF-8: the byte at offset {offset} is wrong")]
    NotUtf8 {
        /// Offset of the first wrong byte.
        offset: usize,
    },
    /// Nested too deeply to be honest.
    #[error("the JSON body nests deeper than {depth_max} levels")]
    TooDeep {
        /// The limit.
        depth_max: usize,
    },
    /// So many small values that parsing them costs more than any request is worth.
    #[error("the JSON body has more than {values_max} values")]
    TooManyValues {
        /// The limit.
        values_max: usize,
    },
    /// More base64 strings than any request needs.
    #[error("the body has more than {blobs_max} long base64 strings")]
    TooManyBlobs {
        /// The limit.
        blobs_max: usize,
    },
    /// Too much text beside the pictures.
    #[error(
        "the body has {text_bytes} bytes of text beside its base64; {text_bytes_max} are allowed"
    )]
    TooMuchText {
        /// What was left after lifting.
        text_bytes: usize,
        /// The limit.
        text_bytes_max: usize,
    },
}

/// A marker nobody can guess: 128 random bits.
pub fn random_marker() -> String {
    let mut random = [0_u8; 16];
    rand::rng().fill_bytes(&mut random);
    format!("blob-{:032x}", u128::from_be_bytes(random))
}

/// Lifts the long base64 strings out of a body. A body that is not JSON comes back as it was.
pub fn lift(body: &Bytes, marker: String, limits: &LiftLimits) -> Result<Lifted, LiftError> {
    let text = std::str::from_utf8(body).map_err(|error| LiftError::NotUtf8 {
        offset: error.valid_up_to(),
    })?;
    let looks_like_json = matches!(text.trim_start().as_bytes().first(), Some(b'{' | b'['));
    let lifted = if looks_like_json {
        Scan::new(body, text, marker, limits).run()?
    } else {
        Lifted {
            text: text.to_owned(),
            marker,
            blobs: Vec::new(),
        }
    };
    if lifted.text.len() > limits.text_bytes_max {
        return Err(LiftError::TooMuchText {
            text_bytes: lifted.text.len(),
            text_bytes_max: limits.text_bytes_max,
        });
    }
    Ok(lifted)
}

struct Scan<'a> {
    body: &'a Bytes,
    text: &'a str,
    limits: &'a LiftLimits,
    depth: usize,
    /// Values met so far, give or take one per bracket.
    values: usize,
    /// Everything before this offset is in `out` already.
    copied: usize,
    out: String,
    marker: String,
    blobs: Vec<LiftedBlob>,
}

impl<'a> Scan<'a> {
    fn new(body: &'a Bytes, text: &'a str, marker: String, limits: &'a LiftLimits) -> Self {
        Self {
            body,
            text,
            limits,
            depth: 0,
            values: 0,
            copied: 0,
            out: String::new(),
            marker,
            blobs: Vec::new(),
        }
    }

    fn run(mut self) -> Result<Lifted, LiftError> {
        let bytes = self.text.as_bytes();
        let mut at = 0;
        while at < bytes.len() {
            match bytes[at] {
                b',' => self.value()?,
                b'{' | b'[' => {
                    self.value()?;
                    self.depth += 1;
                    if self.depth > self.limits.depth_max {
                        return Err(LiftError::TooDeep {
                            depth_max: self.limits.depth_max,
                        });
                    }
                }
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                b'"' => {
                    // An unterminated string ends the scan: the adapter's parser will say so.
                    let Some(end) = string_end(bytes, at + 1) else {
                        break;
                    };
                    self.string(at + 1, end)?;
                    at = end;
                }
                _ => {}
            }
            at += 1;
        }
        self.out.push_str(&self.text[self.copied..]);
        Ok(Lifted {
            text: self.out,
            marker: self.marker,
            blobs: self.blobs,
        })
    }

    fn value(&mut self) -> Result<(), LiftError> {
        let values_max = self.limits.values_max;
        self.values += 1;
        if self.values > values_max {
            return Err(LiftError::TooManyValues { values_max });
        }
        Ok(())
    }

    /// Considers the string whose content is `start..end`; both are the offsets beside a quote, so
    /// they are character boundaries.
    fn string(&mut self, start: usize, end: usize) -> Result<(), LiftError> {
        if end - start <= self.limits.lift_bytes_min || is_key(self.text.as_bytes(), end + 1) {
            return Ok(());
        }
        let raw = &self.text[start..end];
        let original = if raw.contains('\\') {
            match unescape(raw) {
                Some(unescaped) => Bytes::from(unescaped),
                None => return Ok(()),
            }
        } else {
            self.body.slice(start..end)
        };
        let Some((bytes, content_type)) = decode(&original) else {
            return Ok(());
        };
        if self.blobs.len() == self.limits.blobs_max {
            return Err(LiftError::TooManyBlobs {
                blobs_max: self.limits.blobs_max,
            });
        }
        self.out.push_str(&self.text[self.copied..start]);
        self.out
            .push_str(&format!("{}:{}", self.marker, self.blobs.len()));
        self.copied = end;
        self.blobs.push(LiftedBlob {
            bytes,
            content_type,
            original,
        });
        Ok(())
    }
}

/// Offset of the closing quote of a string whose content begins at `at`.
fn string_end(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        at += bytes
            .get(at..)?
            .iter()
            .position(|byte| matches!(byte, b'"' | b'\\'))?;
        if bytes[at] == b'"' {
            return Some(at);
        }
        at += 2;
    }
}

/// Whether the string that ended just before `at` is the key of a member.
fn is_key(bytes: &[u8], at: usize) -> bool {
    let next = bytes[at.min(bytes.len())..]
        .iter()
        .find(|byte| !byte.is_ascii_whitespace());
    next == Some(&b':')
}

fn decode(original: &Bytes) -> Option<(Bytes, String)> {
    let text = std::str::from_utf8(original).ok()?;
    if data_url::is_data_url(text) {
        return Some(match data_url::parse(text) {
            Ok(parsed) => (parsed.bytes, parsed.content_type),
            Err(_) => (original.clone(), data_url::BROKEN_CONTENT_TYPE.to_owned()),
        });
    }
    // Words between blanks are prose, however much their letters look like base64.
    if text.contains([' ', '\t']) {
        return None;
    }
    let bytes = data_url::decode_base64(text).ok()?;
    let content_type = data_url::sniff(&bytes).to_owned();
    Some((bytes, content_type))
}

/// The characters a JSON string stands for, or none when an escape is wrong.
fn unescape(raw: &str) -> Option<String> {
    let mut out = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = *rest.as_bytes().get(at + 1)?;
        let mut taken = at + 2;
        out.push(match escape {
            b'"' => '"',
            b'\\' => '\\',
            b'/' => '/',
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let (character, length) = unicode_escape(rest.get(taken..)?)?;
                taken += length;
                character
            }
            _ => return None,
        });
        rest = rest.get(taken..)?;
    }
    out.push_str(rest);
    Some(out)
}

/// The character after `\u`, and how many bytes it took: four, or ten for a surrogate pair.
fn unicode_escape(rest: &str) -> Option<(char, usize)> {
    let high = hex4(rest)?;
    if !(0xD800..0xDC00).contains(&high) {
        return Some((char::from_u32(high)?, 4));
    }
    let low = hex4(rest.get(4..)?.strip_prefix("\\u")?)?;
    if !(0xDC00..0xE000).contains(&low) {
        return None;
    }
    let code = 0x1_0000 + ((high - 0xD800) << 10) + (low - 0xDC00);
    Some((char::from_u32(code)?, 10))
}

fn hex4(text: &str) -> Option<u32> {
    let digits = text.get(..4)?;
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u32::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests;
