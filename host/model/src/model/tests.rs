//! The accelerators' path, weights as tensors of the compute type, run on the CPU: no other device is needed to see it
//! agree with stored weights.

use std::path::Path;

use super::*;
use crate::Prompt;
use crate::image::{RgbBuffer, hd_plan, render_view};

fn load(checkpoint: &str, stored: bool, dtype: DType, activations: Activations) -> Phi3V {
    let placement = Placement {
        device: Device::Cpu,
        dtype,
        stored,
        activations,
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let checkpoint = Checkpoint::open(&golden.join(checkpoint)).unwrap();
    Phi3V::load_at(&checkpoint, DeviceKind::Cpu, placement, &|_| ()).unwrap()
}

/// Logits of a prompt with an image, and of one more token behind it.
fn logits(model: &Phi3V, pixels: &PixelValues) -> Vec<f32> {
    let features = Arc::new(model.encode_image(pixels, &|| true).unwrap());
    let mut ids = vec![1, 32010, 29871, 13];
    ids.extend([-1; 313]);
    ids.extend([1, 1724, 338, 445, 29973, 32007, 29871, 13, 32001]);
    let prompt = Prompt {
        ids,
        image_tokens: 313,
    };
    let mut state = model.begin(&prompt, &[features]).unwrap();
    let mut all = model.advance(&mut state, usize::MAX).unwrap().unwrap();
    model.push(&mut state, 450).unwrap();
    all.extend(model.advance(&mut state, 1).unwrap().unwrap());
    all
}

fn pixels() -> PixelValues {
    let samples = (0..336 * 336 * 3)
        .map(|index| (index * 31 % 251) as u8)
        .collect();
    let png = png(&RgbBuffer::new(336, 336, samples).unwrap());
    let image = crate::image::decode(&png, &crate::image::ImageLimits::default(), false).unwrap();
    render_view(&image, &hd_plan(336, 336, 1).unwrap()).unwrap()
}

fn png(image: &RgbBuffer) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let buffer = image::RgbImage::from_raw(
        image.width_px(),
        image.height_px(),
        image.samples().to_vec(),
    );
    buffer
        .unwrap()
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// The largest difference of two models' logits for one prompt.
fn difference(have: &Phi3V, want: &Phi3V) -> f32 {
    let pixels = pixels();
    let [have, want] = [have, want].map(|model| logits(model, &pixels));
    assert_eq!(have.len(), want.len());
    assert!(have.iter().all(|logit| logit.is_finite()));
    let apart = have.iter().zip(&want).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, f32::max)
}

#[test]
fn weights_as_device_tensors_give_the_same_logits() {
    let checkpoint = "ckpt_mha";
    let want = load(checkpoint, true, DType::F32, Activations::Float);
    for (dtype, tolerance) in [(DType::F32, 2e-4), (DType::F16, 0.05)] {
        let have = load(checkpoint, false, dtype, Activations::Float);
        let difference = difference(&have, &want);
        assert!(difference < tolerance, "{dtype:?}: {difference}");
    }
}

/// On a CPU candle multiplies the blocks with activations of eight bits, as the kernels do on the stored weights: either is
/// as far from floats.
#[test]
fn int4_blocks_on_a_device_give_the_logits_of_the_stored_ones() {
    let checkpoint = "ckpt_mha_int4";
    let want = load(checkpoint, true, DType::F32, Activations::Float);
    let kernels = load(checkpoint, true, DType::F32, Activations::Int8);
    let allowed = 2.0 * difference(&kernels, &want);
    for dtype in [DType::F32, DType::F16] {
        let have = load(checkpoint, false, dtype, Activations::Float);
        let difference = difference(&have, &want);
        assert!(difference < allowed, "{dtype:?}: {difference}, {allowed}");
    }
}
