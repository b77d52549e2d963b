//! `[images]`: limits on the pictures clients send, and which of them may be fetched.

use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// `[images]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImagesConfig {
    /// Largest encoded image, in bytes.
    pub bytes_max: u64,
    /// Most pixels of one image, read from its header before anything is decoded.
    pub pixels_max: u64,
    /// Longest side of one image, in pixels.
    pub side_px_max: u32,
    /// Longest side over shortest side.
    pub aspect_ratio_max: u32,
    /// Images of one request.
    pub count_max: u32,
    /// Decoded images of all requests together, in MiB, with what decoding takes. Needs a restart.
    pub decoded_mib_max: u64,
    /// Crops of all requests together, from when they are made until the answers about them end, in MiB. Needs a restart.
    pub crops_mib_max: u64,
    /// What operations on images hold while they run, of all requests together, in MiB. Needs a restart.
    pub canvases_mib_max: u64,
    /// Encoded images that one request names instead of sending them, all together, in bytes.
    pub named_bytes_max: u64,
    /// Whether photos are turned as their EXIF tag says.
    pub apply_exif_orientation: bool,
    /// Folder below which `file:` URLs are read, an absolute path; empty reads none.
    pub files_root: PathBuf,
    /// Which images are fetched from the network.
    pub fetch: FetchConfig,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self {
            bytes_max: 20 << 20,
            pixels_max: 40_000_000,
            side_px_max: 16_384,
            aspect_ratio_max: 100,
            count_max: 8,
            decoded_mib_max: 2048,
            crops_mib_max: 1024,
            canvases_mib_max: 1024,
            named_bytes_max: 32 << 20,
            apply_exif_orientation: true,
            files_root: PathBuf::new(),
            fetch: FetchConfig::default(),
        }
    }
}

/// `[images.fetch]`: nothing is fetched unless a scheme is on and the host is listed. Addresses that
/// are not public are never connected to; no key changes that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FetchConfig {
    /// Whether images are fetched from `https:` URLs.
    pub https: bool,
    /// Whether images are fetched from `http:` URLs.
    pub http: bool,
    /// Hosts that may be fetched from: a name, `*.suffix` for every name below it, `*` for all.
    pub hosts: Vec<String>,
    /// Ports that may be connected to.
    pub ports: Vec<u16>,
    /// Networks never connected to although their addresses are public, such as `198.51.100.0/24`.
    pub refused_networks: Vec<IpNet>,
    /// Redirects followed for one image, each checked like the first address; 0 follows none.
    pub redirects_max: u32,
    /// Seconds one image may take, from the first look-up to the last byte.
    pub timeout_s: u64,
    /// Images fetched at once, of all requests; more wait. Needs a restart.
    pub at_once_max: usize,
    /// Images fetched for one request.
    pub per_request_max: u32,
    /// Names looked up at once, each on a thread of its own. Needs a restart.
    pub lookups_max: usize,
    /// Seconds one look-up may take, the wait for its turn included.
    pub lookup_timeout_s: u64,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            https: false,
            http: false,
            hosts: Vec::new(),
            ports: vec![443, 80],
            refused_networks: Vec::new(),
            redirects_max: 3,
            timeout_s: 10,
            at_once_max: 32,
            per_request_max: 8,
            lookups_max: 16,
            lookup_timeout_s: 5,
        }
    }
}
