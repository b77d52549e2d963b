//! What `[images]` and `[images.fetch]` may say.

use std::path::Path;

use super::{Found, misnamed};
use crate::config::{FetchConfig, ImagesConfig};

/// Most bytes a pixel takes while it is decoded: four channels of 16 bits, and what they become.
const DECODING_BYTES_MAX: u64 = 14;
/// Most bytes a pixel takes while the shipped image policy has a picture cut: a tall one is turned and then turned over, with three
/// channels of 8 bits each time.
const CUTTING_BYTES_MAX: u64 = 6;
/// What a grid of its most crops takes then, whatever the picture: scaled up, between two passes, and padded, in MiB.
const GRID_MIB_MAX: u64 = 16;
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
    ];
    for (name, value, low, high) in rows {
        found.range(&format!("images.{name}"), value, low, high);
    }
    check_room(images, found);
    check_files_root(&images.files_root, found);
    check_fetch(&images.fetch, found);
}

/// One picture of the most pixels finds room at every stage: it would be refused whoever sends it, and late.
fn check_room(images: &ImagesConfig, found: &mut Found) {
    let one_mib = |pixel_bytes: u64| images.pixels_max.saturating_mul(pixel_bytes) >> 20;
    let rows = [
        (
            "decoded_mib_max",
            images.decoded_mib_max,
            one_mib(DECODING_BYTES_MAX),
        ),
        (
            "canvases_mib_max",
            images.canvases_mib_max,
            one_mib(CUTTING_BYTES_MAX) + GRID_MIB_MAX,
        ),
    ];
    for (name, mib, one_mib) in rows {
        if mib < one_mib || mib > DECODED_MIB_MAX {
            found.add(
                format!("images.{name}"),
                format!("{mib} MiB have no room for one picture of images.pixels_max, or are more than can be counted"),
                &format!("{one_mib} to {DECODED_MIB_MAX}"),
            );
        }
    }
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
        if let Some(meant) = misnamed(name).filter(|_| pattern != "*") {
            found.add(
                format!("images.fetch.hosts.{index}"),
                format!("`{pattern}` is not a host"),
                &format!("{meant}; `*.suffix` for every name below one, `*` for all"),
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

#[cfg(test)]
mod tests {
    use visor_model::image::hd_plan;

    use super::*;

    /// Pictures of about so many pixels, wide and tall.
    fn sizes(pixels: u64) -> impl Iterator<Item = (u32, u32)> {
        let ratios = (0..40).map(|step| 100_f64.powf(f64::from(step) / 39.0));
        ratios.flat_map(move |ratio| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_precision_loss,
                clippy::cast_sign_loss,
                reason = "sides of a picture"
            )]
            let short = ((pixels as f64 / ratio).sqrt() as u32).max(1);
            let long = u32::try_from(pixels / u64::from(short)).unwrap();
            [(long, short), (short, long)]
        })
    }

    #[test]
    fn what_is_allowed_has_room_for_whatever_the_shipped_policy_cuts() {
        let mut nearest = u64::MAX;
        for pixels in [4096, 100_000, 1 << 20, 4 << 20, 40_000_000, 1 << 26] {
            let room = (((pixels * CUTTING_BYTES_MAX) >> 20) + GRID_MIB_MAX) << 20;
            for (width, height) in sizes(pixels) {
                for crops in 1..=16 {
                    let Ok(plan) = hd_plan(width, height, crops) else {
                        continue;
                    };
                    let taken = plan.cost((width, height)).unwrap().held_bytes();
                    assert!(
                        taken <= room,
                        "{width}x{height}, {crops}: {taken} of {room}"
                    );
                    nearest = nearest.min(room - taken);
                }
            }
        }
        assert!(nearest < GRID_MIB_MAX << 20, "{nearest}: less would do");
    }
}
