//! One integration binary; each module is a specification of one part.

mod tensor_cores;
