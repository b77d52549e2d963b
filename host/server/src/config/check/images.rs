//! What `[images]` and `[images.fetch]` may say.

use std::path::Path;

use super::Found;
use crate::config::{FetchConfig, ImagesConfig};

/// Most bytes a pixel takes while it is decoded: four channels of 16 bits, and what they become.
const DECODING_BYTES_MAX: u64 = 14;
/// Most memory for decoded pictures, in MiB: a count of KiB that fits 31 bits.
const DECODED_MIB_MAX: u64 = 2 << 20;
/// A picture of 17 crops is 22 MiB.
const CROPS_MIB_MIN: u64 = 32;

/// Every mistake in `[images]`.
pub(super) fn check(images: &ImagesConfig, found: &mut Found) {
    let aspect_ratio = images.aspect_ratio_max;
    let rows = [
        ("bytes_max", images.bytes_max, 1024, 1 << 30),
        ("pixels_max", images.pixels_max, 4096, 1 << 30),
        ("side_px_max", images.side_px_max.into(), 64, 65_535),
        ("aspect_ratio_max", aspect_ratio.into(), 1, 65_535),
        ("count_max", images.count_max.into(), 0, 256),
        ("named_bytes_max", images.named_bytes_max, 1024, 4 << 30),
        (
            "crops_mib_max",
            images.crops_mib_max,
            CROPS_MIB_MIN,
            DECODED_MIB_MAX,
        ),
        (
            "canvases_mib_max",
            images.canvases_mib_max,
            1,
            DECODED_MIB_MAX,
        ),
    ];
    for (name, value, low, high) in rows {
        found.range(&format!("images.{name}"), value, low, high);
    }
    let one_mib = images.pixels_max.saturating_mul(DECODING_BYTES_MAX) >> 20;
    let decoded_mib = images.decoded_mib_max;
    if decoded_mib < one_mib || decoded_mib > DECODED_MIB_MAX {
        found.add(
            "images.decoded_mib_max",
            format!("{decoded_mib} MiB have no room for one picture of images.pixels_max, or are more than can be counted"),
            &format!("{one_mib} to {DECODED_MIB_MAX}"),
        );
    }
    check_files_root(&images.files_root, found);
    check_fetch(&images.fetch, found);
}

fn check_files_root(root: &Path, found: &mut Found) {
    if root.as_os_str().is_empty() {
        return;
    }
    if !cfg!(unix) {
        let message = "files cannot be opened without following links on this system";
        found.add("images.files_root", message, "empty");
    } else if !root.is_absolute() || !root.is_dir() {
        found.add(
            "images.files_root",
            format!("`{}` is not the absolute path of a folder", root.display()),
            "a folder such as /srv/pictures; empty reads no files",
        );
    }
}

fn check_fetch(fetch: &FetchConfig, found: &mut Found) {
    found.range("images.fetch.redirects_max", fetch.redirects_max, 0, 10);
    found.range("images.fetch.timeout_s", fetch.timeout_s, 1, 300);
    found.range("images.fetch.at_once_max", fetch.at_once_max, 1, 4096);
    found.range(
        "images.fetch.per_request_max",
        fetch.per_request_max,
        0,
        256,
    );
    found.range("images.fetch.lookups_max", fetch.lookups_max, 1, 1024);
    found.range(
        "images.fetch.lookup_timeout_s",
        fetch.lookup_timeout_s,
        1,
        300,
    );
    for (index, pattern) in fetch.hosts.iter().enumerate() {
        let name = pattern.strip_prefix("*.").unwrap_or(pattern);
        // As a URL's host is compared: lower case, punycode, addresses in their one spelling.
        let canonical = url::Host::parse(name).map(|host| host.to_string());
        let good = canonical.as_deref() == Ok(name) && !name.contains('*');
        if pattern != "*" && !good {
            let meant = match canonical {
                Ok(canonical) if canonical != name => {
                    format!("`{canonical}`, as it is written in a URL")
                }
                _ => "a host name without scheme, port or path, `*.suffix`, or `*`".to_owned(),
            };
            found.add(
                format!("images.fetch.hosts.{index}"),
                format!("`{pattern}` is not a host"),
                &meant,
            );
        }
    }
    if (fetch.https || fetch.http) && fetch.hosts.is_empty() {
        found.add(
            "images.fetch.hosts",
            "empty: every URL would be refused",
            "the hosts that may be fetched from; `*` for all",
        );
    }
    if fetch.ports.is_empty() || fetch.ports.contains(&0) {
        found.add(
            "images.fetch.ports",
            "empty, or port 0",
            "the ports that may be connected to, such as [443, 80]",
        );
    }
}
