//! Which device computes, and in which type. The forward pass itself never asks.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};

use crate::error::ModelError;

/// What the configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DeviceChoice {
    /// The best device of this build that starts, the CPU at worst.
    #[default]
    Auto,
    /// The CPU, always there.
    Cpu,
    /// An Apple GPU; needs the `metal` feature.
    Metal,
    /// An NVIDIA GPU; needs the `cuda` feature.
    Cuda,
}

impl DeviceChoice {
    /// The devices to try, best first. `Auto` lists what this build has and ends with the CPU.
    pub fn kinds(self) -> Vec<DeviceKind> {
        match self {
            Self::Cpu => vec![DeviceKind::Cpu],
            Self::Metal => vec![DeviceKind::Metal],
            Self::Cuda => vec![DeviceKind::Cuda],
            Self::Auto => {
                let mut kinds = Vec::new();
                if cfg!(feature = "metal") {
                    kinds.push(DeviceKind::Metal);
                }
                if cfg!(feature = "cuda") {
                    kinds.push(DeviceKind::Cuda);
                }
                kinds.push(DeviceKind::Cpu);
                kinds
            }
        }
    }
}

impl DeviceChoice {
    /// Whether this build has what one of its devices needs: one that insists on another would never compute.
    ///
    /// # Errors
    /// [`ModelError::Device`], which says how to build it.
    pub fn check_built(self) -> Result<(), ModelError> {
        self.kinds()
            .into_iter()
            .try_for_each(DeviceKind::check_built)
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
        })
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "metal" => Ok(Self::Metal),
            "cuda" => Ok(Self::Cuda),
            _ => Err(format!(
                "device {text:?} is unknown; use auto, cpu, metal or cuda"
            )),
        }
    }
}

/// What INT4 and INT8 weights are multiplied with on the CPU. Weights stored as floats, and accelerators, take floats always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Activations {
    /// f32, the weights widened to f32: the reference that golden tensors are compared with.
    #[default]
    Float,
    /// Eight bits with a scale for every 64 columns: several times as fast, and within a hundredth of the product.
    Int8,
}

impl fmt::Display for Activations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float => "float",
            Self::Int8 => "int8",
        })
    }
}

impl FromStr for Activations {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "float" => Ok(Self::Float),
            "int8" => Ok(Self::Int8),
            _ => Err(format!(
                "activations {text:?} are unknown; use int8 or float"
            )),
        }
    }
}

/// A device that can be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// f32 arithmetic on weights kept as they are stored.
    Cpu,
    /// An Apple GPU through candle.
    Metal,
    /// An NVIDIA GPU through candle.
    Cuda,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
        })
    }
}

/// Models up to this size are computed in f32 on an accelerator too: parity costs them nothing.
const F32_BYTES_MAX: u64 = 2 << 30;

impl DeviceKind {
    fn check_built(self) -> Result<(), ModelError> {
        let built = match self {
            Self::Cpu => true,
            Self::Metal => cfg!(feature = "metal"),
            Self::Cuda => cfg!(feature = "cuda"),
        };
        if built {
            return Ok(());
        }
        Err(ModelError::Device {
            device: self,
            message: format!(
                "this build has no {self} support; build with --features {self} or use device = cpu"
            ),
        })
    }

    /// Starts the device.
    ///
    /// # Errors
    /// [`ModelError::Device`] when the build lacks its feature or the driver refuses.
    pub fn open(self) -> Result<Device, ModelError> {
        self.check_built()?;
        let refused = |error: candle_core::Error| ModelError::Device {
            device: self,
            message: error.to_string(),
        };
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Metal => Device::new_metal(0).map_err(refused),
            Self::Cuda => Device::new_cuda(0).map_err(refused),
        }
    }

    /// The type activations are computed in.
    ///
    /// The CPU computes in f32. An accelerator holds weights that are stored as floats in the compute type, so a model
    /// whose f32 form is above 2 GiB (`parameters` counts weights) is computed in its stored half type, f16 staying f16
    /// and the rest bf16; norms, softmax and angles stay f32 everywhere, and INT4 weights stay INT4.
    pub fn compute_dtype(self, parameters: u64, stored: DType) -> DType {
        match (self, stored) {
            (Self::Cpu, _) => DType::F32,
            _ if parameters.saturating_mul(4) <= F32_BYTES_MAX => DType::F32,
            (_, DType::F16) => DType::F16,
            _ => DType::BF16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_read_as_they_print() {
        for choice in [
            DeviceChoice::Auto,
            DeviceChoice::Cpu,
            DeviceChoice::Metal,
            DeviceChoice::Cuda,
        ] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!(
            "gpu"
                .parse::<DeviceChoice>()
                .unwrap_err()
                .contains("auto, cpu, metal or cuda")
        );
    }

    #[test]
    fn auto_ends_with_the_cpu() {
        assert_eq!(DeviceChoice::Auto.kinds().last(), Some(&DeviceKind::Cpu));
    }

    #[cfg(not(feature = "metal"))]
    #[test]
    fn a_device_outside_the_build_says_how_to_get_it() {
        let message = DeviceKind::Metal.open().unwrap_err().to_string();
        assert!(message.contains("--features metal"), "{message}");
    }

    #[test]
    fn only_big_models_on_accelerators_compute_in_half() {
        assert_eq!(
            DeviceKind::Cpu.compute_dtype(4 << 30, DType::BF16),
            DType::F32
        );
        assert_eq!(
            DeviceKind::Metal.compute_dtype(1 << 20, DType::BF16),
            DType::F32
        );
        assert_eq!(
            DeviceKind::Metal.compute_dtype(4 << 30, DType::F16),
            DType::F16
        );
        assert_eq!(
            DeviceKind::Cuda.compute_dtype(4 << 30, DType::F32),
            DType::BF16
        );
    }
}
